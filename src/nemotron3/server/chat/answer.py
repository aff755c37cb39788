"""The message that answers a chat, complete or in chunks.

A message contains its reasoning twice, as `reasoning` (vLLM's name) and as `reasoning_content`
(DeepSeek's name, which most clients read). The content of an empty answer is ""; it is null only in
a message with tool calls.
"""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from nemotron3.inference.output_processor import AnswerDelta, CompletionOutput, Prompt
from nemotron3.server.chat.body import ChatBody
from nemotron3.server.generation.logprobs import chat_logprobs, prompt_logprobs
from nemotron3.server.generation.prompts import ChatPlan
from nemotron3.server.generation.serving import RequestHandle, ServingContext, finish_of, new_id
from nemotron3.server.generation.token_ids import token_fields
from nemotron3.server.generation.usage import usage_of
from nemotron3.server.http.errors import APIError
from nemotron3.server.http.streaming import DONE, event
from nemotron3.text import CallDelta, ContentDelta, ReasoningDelta


class ChatAnswer:
    """One request's answer, complete or as a stream."""

    def __init__(
        self,
        serving: ServingContext,
        body: ChatBody,
        plan: ChatPlan,
        prompt: Prompt,
        handle: RequestHandle,
    ) -> None:
        self._tokenizer = serving.llm.tokenizer
        self._body = body
        self._plan = plan
        self._prompt = prompt
        self._handle = handle
        self._shows_reasoning = body.include_reasoning is not False
        self._shows_logprobs = bool(body.logprobs)
        self._num_answers = plan.params.n
        self._kind = "chat.completion.chunk"
        self._calls: dict[int, list[str]] = {}
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": serving.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer's JSON."""
        output = await self._handle.whole()
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
        """The stream of the answer, from the role to the usage."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        is_continuous = options is not None and bool(options.continuous_usage_stats)
        for index in range(self._num_answers):
            first = self._chunk(index, {"role": "assistant", "content": ""}, with_usage)
            if self._body.return_token_ids and index == 0:
                first["prompt_token_ids"] = list(self._prompt.ids)
            yield event(first)
        try:
            async with aclosing(self._handle.deltas()) as deltas:
                async for delta in deltas:
                    for chunk in self._chunks(delta, with_usage):
                        if is_continuous:
                            chunk["usage"] = self._handle.usage_so_far().body()
                        yield event(chunk)
        except APIError as error:
            yield event(error.body())
            yield DONE
            return
        if with_usage:
            usage = usage_of(self._handle.output()).body()
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
            choice["weight_versions"] = list(answer.weight_versions)
        if self._body.returns_ids:
            with_routes = self._body.return_routed_experts
            message |= token_fields(self._prompt, answer, with_routes=with_routes)
        return choice

    def _stop_reason(self, reason: str | int | None) -> str | int | None:
        """The stop string or token that ended the answer, if the client asked for it."""
        is_theirs = reason not in self._plan.params.stop_token_ids or reason in (
            self._body.stop_token_ids or ()
        )
        return reason if is_theirs else None

    def _logprobs(self, logprobs: Sequence[Any]) -> dict[str, Any] | None:
        if not self._shows_logprobs:
            return None
        by_id = bool(self._body.return_tokens_as_token_ids)
        return {"content": chat_logprobs(self._tokenizer, logprobs, by_id=by_id), "refusal": None}

    def _chunk(self, index: int, delta: dict[str, Any], with_usage: bool) -> dict[str, Any]:  # noqa: FBT001
        chunk: dict[str, Any] = {
            **self._head,
            "object": self._kind,
            "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
        }
        return chunk | {"usage": None} if with_usage else chunk

    def _chunks(self, delta: AnswerDelta, with_usage: bool) -> list[dict[str, Any]]:  # noqa: FBT001
        """The chunks for one delta of the engine: content first, then the finish reason."""
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
                choice["weight_versions"] = list(delta.weight_versions)
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
