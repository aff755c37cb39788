"""`nemotron3 chat`: talk to a model in the terminal, its thinking dimmed.

It uses the same engine and the same parsing of answers as the server, without HTTP. The model may
use a calculator, that of the environment of this name.
"""

import argparse
import asyncio
import json
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron3.cli import terminal
from nemotron3.cli.engine_options import load_engine
from nemotron3.environments.calculator import CALCULATE, Calculator, CalculatorSession
from nemotron3.environments.environment import ERROR
from nemotron3.errors import Nemotron3Error
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.output_processor import RequestOutput
from nemotron3.inference.requests import FinishReason, SamplingParams
from nemotron3.text import CallDelta, ContentDelta, ParsedCall, ReasoningDelta

_HELP = """\
/budget N     think for at most N tokens; /budget off closes thinking at once, /budget max lifts it
/think on     think before answering; /think off answers at once
/tools off    offer no calculator; /tools on offers it again
/clear        forget the conversation
/exit         leave; Ctrl-D does too, and Ctrl-C stops an answer"""
_MOST_CALLS = 8
"""Calls of one answer after which it is ended."""
_TOP_P = 0.95  # where neither the user nor the model's directory says
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


@dataclass
class Talk:
    """A conversation, and how the model is to answer it."""

    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    system: str | None = None
    budget: int | None = None
    is_thinking: bool = True
    has_tools: bool = True
    """Whether the model may use the calculator."""
    params: SamplingParams = field(default_factory=SamplingParams)
    """All but the budget, which may change."""

    def command(self, line: str) -> str:
        """Follow a line that begins with a slash; what to say about it."""
        verb, _, value = line.partition(" ")
        value = value.strip()
        match verb, value:
            case "/budget", "max":
                self.budget = None
            case "/budget", "off":
                self.budget = 0
            case "/budget", _ if value.isdecimal():
                self.budget = int(value)
            case "/think", "on" | "off":
                self.is_thinking = value == "on"
            case "/tools", "on" | "off":
                self.has_tools = value == "on"
                return "the calculator is offered" if self.has_tools else "no tools"
            case "/clear", "":
                self.messages.clear()
                return "the conversation is forgotten"
            case "/help", "":
                return _HELP
            case _:
                return f"{line} is not understood\n{_HELP}"
        if not self.is_thinking:
            return "no thinking"
        limit = "without a limit" if self.budget is None else f"for at most {self.budget} tokens"
        return f"thinking {limit}"

    def conversation(self) -> list[dict[str, Any]]:
        """All messages, the system's first."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *self.messages]


def chat_command(known: argparse.Namespace) -> int:
    """Talk until the user leaves."""
    talk = Talk(
        system=known.system,
        budget=known.budget,
        is_thinking=not known.no_think,
        has_tools=not known.no_tools,
    )
    llm = load_engine(known)
    try:
        talk.params = _params(known, llm)
        if sys.stdin.isatty():
            print(f"{llm.model_name}, {llm.max_model_len:,} tokens of context. /help for commands.")
        with asyncio.Runner() as runner:
            while (line := _read()) is not None:
                if line in ("/exit", "/quit"):
                    break
                if line.startswith("/"):
                    print(talk.command(line))
                elif line:
                    _turn(runner, llm, talk, line)
    finally:
        llm.close()
    return 0


def _params(known: argparse.Namespace, llm: AsyncLLM) -> SamplingParams:
    options = {name: getattr(known, name) for name in ("temperature", "top_p", "max_tokens")}
    options["reasoning_budget"] = known.budget  # so that a wrong one is refused before the talk
    given = {name: value for name, value in options.items() if value is not None}
    return SamplingParams(**{"top_p": _TOP_P, **llm.defaults.sampling, **given})


def _read() -> str | None:
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _turn(runner: asyncio.Runner, llm: AsyncLLM, talk: Talk, line: str) -> None:
    """An answer to a line, with the calls of tools that it needs."""
    talk.messages.append({"role": "user", "content": line})
    for _ in range(_MOST_CALLS):
        printer, calls = _Printer(), list[ParsedCall]()
        try:
            calls = runner.run(_answer(llm, talk, printer))
        except KeyboardInterrupt:
            printer.end("stopped")
        except Nemotron3Error as error:
            talk.messages.pop()
            print(f"nemotron3: {error}", file=sys.stderr)
            return
        turn: dict[str, Any] = {"role": "assistant", "content": printer.content}
        if printer.reasoning:
            turn["reasoning_content"] = printer.reasoning
        talk.messages.append(turn)
        if not calls:
            return
        turn["tool_calls"] = [
            {
                "id": f"call_{place}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for place, call in enumerate(calls)
        ]
        for place, call in enumerate(calls):
            result = runner.run(_call(call))
            printer.called(call, result)
            talk.messages.append(
                {"role": "tool", "tool_call_id": f"call_{place}", "content": result}
            )


async def _call(call: ParsedCall) -> str:
    """What the calculator says; the description of a mistake where the call is wrong."""
    environment = Calculator()
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError as error:
        return f"{ERROR}the arguments are no JSON: {error}"
    return await environment.call_tool(CalculatorSession(), call.name, arguments)


async def _answer(llm: AsyncLLM, talk: Talk, printer: "_Printer") -> list[ParsedCall]:
    """Show an answer; returns the calls that it ends with."""
    prompt = llm.prepare_chat(
        talk.conversation(),
        enable_thinking=talk.is_thinking,
        tools=[CALCULATE] if talk.has_tools else None,
    )
    params = replace(talk.params, reasoning_budget=talk.budget)
    params = llm.with_default_length(prompt, params)
    number = len(talk.messages)
    started, first = time.monotonic(), None
    async with aclosing(llm.submit(prompt, params, request_id=f"chat-{number}")) as stream:
        async for delta in stream:
            if first is None and delta.token_ids:
                first = time.monotonic()
            for part in delta.parts:
                match part:
                    case ReasoningDelta():
                        printer.think(part.text)
                    case ContentDelta():
                        printer.say(part.text)
                    case CallDelta():
                        pass  # it is shown with its result
    output = stream.output()
    now = time.monotonic()
    first = now if first is None else first
    printer.end(_facts(output, waited_s=first - started, wrote_s=now - first))
    return [call for call in output.outputs[0].tool_calls if call.is_complete]


def _facts(output: RequestOutput, *, waited_s: float, wrote_s: float) -> str:
    answer = output.outputs[0]
    size = len(answer.token_ids)
    facts = [f"{size} tokens"]
    if answer.num_reasoning_tokens:
        facts.append(f"{answer.num_reasoning_tokens} of them thinking")
    if size > 1 and wrote_s > 0:
        facts.append(f"{(size - 1) / wrote_s:.1f} tokens/s")
    facts.append(f"first after {waited_s:.2f} s")
    drafts = answer.acceptance
    if drafts.drafted:
        facts.append(f"{100 * drafts.accepted / drafts.drafted:.0f} % of drafts accepted")
    if answer.finish_reason is FinishReason.LENGTH:
        facts.append("cut off: no room for more tokens")
    return ", ".join(facts)


class _Printer:
    """Shows an answer as it comes, and keeps it."""

    def __init__(self) -> None:
        self.reasoning = ""
        self.content = ""
        self._dim, self._reset = (_DIM, _RESET) if sys.stdout.isatty() else ("", "")

    def think(self, text: str) -> None:
        self.reasoning += text
        print(self._dim, end="")
        terminal.write(text)
        print(self._reset, end="", flush=True)

    def say(self, text: str) -> None:
        if self.reasoning and not self.content:
            print("\n")
        self.content += text
        terminal.write(text)

    def called(self, call: ParsedCall, result: str) -> None:
        print(self._dim, end="")
        terminal.write(f"{call.name} {call.arguments} = {result}")
        print(self._reset)

    def end(self, facts: str) -> None:
        print(f"\n{self._dim}[{facts}]{self._reset}")
