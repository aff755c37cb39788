"""`nemotron3 chat`: talk to a model in the terminal, its thinking dimmed.

It uses the same engine and the same parsing of answers as the server, without HTTP.
"""

import argparse
import asyncio
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from nemotron3.cli import terminal
from nemotron3.cli.engine_options import load_engine
from nemotron3.errors import Nemotron3Error
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.inference.output_processor import RequestOutput
from nemotron3.inference.requests import FinishReason, SamplingParams
from nemotron3.text import ContentDelta, ReasoningDelta

_HELP = """\
/budget N     think for at most N tokens; /budget off closes thinking at once, /budget max lifts it
/think on     think before answering; /think off answers at once
/clear        forget the conversation
/exit         leave; Ctrl-D does too, and Ctrl-C stops an answer"""
_TOP_P = 0.95  # where neither the user nor the model's directory says
_DIM, _RESET = "\x1b[2m", "\x1b[0m"


@dataclass
class Talk:
    """A conversation, and how the model is to answer it."""

    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    system: str | None = None
    budget: int | None = None
    is_thinking: bool = True
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
    talk.messages.append({"role": "user", "content": line})
    printer = _Printer()
    try:
        runner.run(_answer(llm, talk, printer))
    except KeyboardInterrupt:
        printer.end("stopped")
    except Nemotron3Error as error:
        talk.messages.pop()
        print(f"nemotron3: {error}", file=sys.stderr)
        return
    turn = {"role": "assistant", "content": printer.content}
    if printer.reasoning:
        turn["reasoning_content"] = printer.reasoning
    talk.messages.append(turn)


async def _answer(llm: AsyncLLM, talk: Talk, printer: "_Printer") -> None:
    prompt = llm.prepare_chat(talk.conversation(), enable_thinking=talk.is_thinking)
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
                    case _:
                        raise AssertionError("a call without tools")
    output = stream.output()
    now = time.monotonic()
    first = now if first is None else first
    printer.end(_facts(output, waited_s=first - started, wrote_s=now - first))


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

    def end(self, facts: str) -> None:
        print(f"\n{self._dim}[{facts}]{self._reset}")
