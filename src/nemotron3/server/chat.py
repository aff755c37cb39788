"""/v1/chat/completions: a conversation in, a message out.

Reasoning is in the message twice, as `reasoning` (vLLM's name) and as `reasoning_content`
(DeepSeek's, which most clients read); the same text under both, so that either finds it. An empty
answer has the content "", and null only beside calls.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from nemotron3.inference.answers import AnswerDelta, CompletionOutput, Prompt
from nemotron3.server.answering import Answering, Desk, finish_of, new_id
from nemotron3.server.chat_bodies import ChatBody, NamedTool
from nemotron3.server.logprobs import chat_logprobs, prompt_logprobs
from nemotron3.server.plan import ChatPlan, ending_with_call, json_form, wanted_form
from nemotron3.server.refusals import RefusedError, invalid
from nemotron3.server.sampling import (
    NO_DEFAULTS,
    budget_name,
    one_of,
    resolve_thinking,
    sampling_params,
    structured_output,
)
from nemotron3.server.streaming import DONE, event
from nemotron3.server.tool_choice import tool_use
from nemotron3.server.usage import usage_of
from nemotron3.text import CallDelta, ContentDelta, ReasoningDelta


def plan_chat(
    body: ChatBody, tool_call_end: int, defaults: Mapping[str, Any] = NO_DEFAULTS
) -> ChatPlan:
    """What the body asks for, beside the model's defaults; raises where it contradicts itself."""
    named = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    word = None if isinstance(body.tool_choice, NamedTool) else body.tool_choice
    tools = tool_use(body.tools, word, named=named, is_parallel=body.parallel_tool_calls)
    thinking = resolve_thinking(body, body.chat_template_kwargs, body.reasoning_effort)
    said = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
    }
    limits = {"max_completion_tokens": body.max_completion_tokens, "max_tokens": body.max_tokens}
    limit = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
    params = sampling_params(
        body,
        defaults,
        names={
            "max_tokens": limit,
            "logprobs": "top_logprobs",
            "reasoning_budget": budget_name(body, body.chat_template_kwargs),
        },
        n=body.n,
        max_tokens=one_of(limits),
        logprobs=_logprobs(body),
        prompt_logprobs=body.prompt_logprobs,
        reasoning_budget=thinking.budget,
        structured=wanted_form(
            tools,
            structured_output(body.structured_outputs),
            _response_format(body),
        ),
    )
    _assert_stream_options(body)
    return ChatPlan(
        messages=body.messages,
        tools=tools.listed,
        options=thinking.template_options() | {k: v for k, v in said.items() if v is not None},
        params=ending_with_call(params, tools, tool_call_end),
        is_single_call=tools.is_single,
        max_tokens_name=limit,
        names={
            "effort": "reasoning_effort",
            "budget_hint": "chat_template_kwargs.budget_hint",
        },
    )


def _response_format(body: ChatBody) -> Any:
    wanted = body.response_format
    if wanted is None:
        return None
    schema = wanted.json_schema.schema_ if wanted.json_schema is not None else None
    return json_form(wanted.type, schema, "response_format")


def _logprobs(body: ChatBody) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    return None


def _assert_stream_options(body: ChatBody) -> None:
    options = body.stream_options
    if options is not None and not body.stream:
        raise invalid("stream_options is for streams; send stream: true", "stream_options")
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise invalid(
            "stream_options.continuous_usage_stats needs include_usage: true", "stream_options"
        )
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("prompt_logprobs is not part of a stream; leave one out", "prompt_logprobs")


class ChatAnswer:
    """One request's answer, whole or as a stream."""

    def __init__(
        self, desk: Desk, body: ChatBody, plan: ChatPlan, prompt: Prompt, answering: Answering
    ) -> None:
        self._tokenizer = desk.llm.tokenizer
        self._body = body
        self._plan = plan
        self._prompt = prompt
        self._answering = answering
        self._shows_reasoning = body.include_reasoning is not False
        self._shows_logprobs = bool(body.logprobs)
        self._num_answers = plan.params.n
        self._kind = "chat.completion.chunk"
        self._calls: dict[int, list[str]] = {}
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": desk.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer's JSON."""
        output = await self._answering.whole()
        said: dict[str, Any] = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(answer) for answer in output.outputs],
            "usage": usage_of(output).body(),
        }
        if self._plan.params.prompt_logprobs is not None:
            said["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
        if self._body.return_token_ids:
            said["prompt_token_ids"] = list(self._prompt.ids)
        return said

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer's stream, from the role to the usage."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        is_continuous = options is not None and bool(options.continuous_usage_stats)
        for index in range(self._num_answers):
            first = self._chunk(index, {"role": "assistant", "content": ""}, with_usage)
            if self._body.return_token_ids and index == 0:
                first["prompt_token_ids"] = list(self._prompt.ids)
            yield event(first)
        try:
            async with aclosing(self._answering.deltas()) as deltas:
                async for delta in deltas:
                    for chunk in self._chunks(delta, with_usage):
                        if is_continuous:
                            chunk["usage"] = self._answering.usage_so_far().body()
                        yield event(chunk)
        except RefusedError as error:
            yield event(error.body())
            yield DONE
            return
        if with_usage:
            usage = usage_of(self._answering.output()).body()
            last: dict[str, Any] = {"object": self._kind, "choices": [], "usage": usage}
            yield event(self._head | last)
        yield DONE

    def _choice(self, answer: CompletionOutput) -> dict[str, Any]:
        calls = answer.tool_calls[:1] if self._plan.is_single_call else answer.tool_calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not answer.content else answer.content,
            "refusal": None,
        }
        if self._shows_reasoning:
            reasoning = answer.reasoning or None
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls:
            message["tool_calls"] = [
                {
                    "id": new_id("call"),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
        choice: dict[str, Any] = {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": finish_of(answer.finish_reason, [call.arguments for call in calls]),
            "stop_reason": self._stop_reason(answer.stop_reason),
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(answer.token_ids)
        return choice

    def _stop_reason(self, reason: str | int | None) -> str | int | None:
        """What of the client's own ended the answer; the end of a single call is not theirs."""
        is_theirs = reason not in self._plan.params.stop_token_ids or reason in (
            self._body.stop_token_ids or ()
        )
        return reason if is_theirs else None

    def _logprobs(self, logprobs: Sequence[Any]) -> dict[str, Any] | None:
        if not self._shows_logprobs:
            return None
        return {"content": chat_logprobs(self._tokenizer, logprobs), "refusal": None}

    def _chunk(self, index: int, delta: dict[str, Any], with_usage: bool) -> dict[str, Any]:  # noqa: FBT001
        chunk: dict[str, Any] = {
            **self._head,
            "object": self._kind,
            "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
        }
        return chunk | {"usage": None} if with_usage else chunk

    def _chunks(self, delta: AnswerDelta, with_usage: bool) -> list[dict[str, Any]]:  # noqa: FBT001
        """What one delta of the engine comes to: a chunk of the message, a chunk of its end."""
        said = self._said(delta)
        chunks: list[dict[str, Any]] = []
        has_tokens = bool(delta.token_ids) and (
            self._shows_logprobs or bool(self._body.return_token_ids)
        )
        if said or has_tokens:
            chunk = self._chunk(delta.index, said, with_usage)
            choice = chunk["choices"][0]
            if delta.logprobs:
                choice["logprobs"] = self._logprobs(delta.logprobs)
            if self._body.return_token_ids:
                choice["token_ids"] = list(delta.token_ids)
            chunks.append(chunk)
        if delta.finish_reason is not None:
            chunk = self._chunk(delta.index, {}, with_usage)
            chunk["choices"][0] |= {
                "finish_reason": finish_of(delta.finish_reason, self._calls.get(delta.index, ())),
                "stop_reason": self._stop_reason(delta.stop_reason),
            }
            chunks.append(chunk)
        return chunks

    def _said(self, delta: AnswerDelta) -> dict[str, Any]:
        reasoning, content = "", ""
        calls: list[dict[str, Any]] = []
        for part in delta.parts:
            match part:
                case ReasoningDelta():
                    reasoning += part.text
                case ContentDelta():
                    content += part.text
                case CallDelta():
                    calls += self._call(delta.index, part)
        said: dict[str, Any] = {}
        if reasoning and self._shows_reasoning:
            said |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if content:
            said["content"] = content
        if calls:
            said["tool_calls"] = calls
        return said

    def _call(self, index: int, part: CallDelta) -> list[dict[str, Any]]:
        if self._plan.is_single_call and part.index > 0:
            return []
        calls = self._calls.setdefault(index, [])
        said: dict[str, Any] = {"index": part.index}
        if part.index == len(calls):
            calls.append("")
            said |= {"id": new_id("call"), "type": "function"}
        calls[part.index] += part.arguments
        name = {} if part.name is None else {"name": part.name}
        return [said | {"function": {**name, "arguments": part.arguments}}]
