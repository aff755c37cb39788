"""Requests to the engine: submission, their deltas, and how they end."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from nemotron3.inference.async_llm import AsyncLLM, Stream
from nemotron3.inference.output_processor import AnswerDelta, Prompt, RequestOutput
from nemotron3.inference.requests import FailureKind, FinishReason, SamplingParams
from nemotron3.server.generation.usage import Usage
from nemotron3.server.http.errors import APIError, invalid_request
from nemotron3.server.http.metrics import ServerMetrics

Notes = MutableMapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class ServingContext:
    """The engine, its metrics, and the settings that requests of all endpoints share."""

    llm: AsyncLLM
    metrics: ServerMetrics
    model_name: str
    defaults: Mapping[str, Any]
    """Values of `SamplingParams` for fields that a request does not give."""
    created: int = field(default_factory=lambda: int(time.time()))

    def assert_serves(self, model: str | None) -> None:
        """Refuse a model of another name."""
        if model is not None and model != self.model_name:
            raise APIError(
                404,
                f"model is {model!r}; this server has {self.model_name!r}",
                "model",
                "model_not_found",
            )

    async def submit(self, prompt: Prompt, params: SamplingParams, notes: Notes) -> "RequestHandle":
        """Submit a request to the engine; raises if its queue is full or the request is invalid.

        A grammar is compiled in another thread. Without `max_tokens`, the default of the model's
        directory is used. `notes` become part of the log record of the HTTP request.
        """
        params = self.llm.with_default_length(prompt, params)
        wanted = params.structured
        grammar = await self.llm.compile_grammar(prompt, params)
        stream = self.llm.submit(prompt, params, request_id=uuid.uuid4().hex, grammar=grammar)
        size = len(prompt.ids)
        notes["prompt_tokens"] = notes.get("prompt_tokens", 0) + size
        return RequestHandle(
            stream,
            self.metrics,
            notes,
            num_prompt_tokens=size,
            grammar_source=None if wanted is None else wanted.source,
        )

    async def submit_all(
        self, prompts: Sequence[Prompt], params: SamplingParams, notes: Notes
    ) -> "list[RequestHandle]":
        """Submit several requests to the engine: all, or none if one is refused."""
        handles: list[RequestHandle] = []
        try:
            for prompt in prompts:
                handles.append(await self.submit(prompt, params, notes))
        except BaseException:
            for handle in handles:
                await handle.stop()
            raise
        return handles


class RequestHandle:
    """One request in the engine: its deltas, then its complete output."""

    def __init__(
        self,
        stream: Stream,
        metrics: ServerMetrics,
        notes: Notes,
        *,
        num_prompt_tokens: int,
        grammar_source: str | None,
    ) -> None:
        """`grammar_source` is the field that asks for structured output, for errors."""
        self._stream = stream
        self._metrics = metrics
        self._notes = notes
        self.num_prompt_tokens = num_prompt_tokens
        self._grammar_source = grammar_source
        self.num_tokens = 0
        self._reasoning: dict[int, int] = {}  # tokens of reasoning in each answer

    def usage_so_far(self) -> Usage:
        """Usage of the deltas that have been read; drafts are counted at the end."""
        return Usage(
            prompt=self.num_prompt_tokens,
            completion=self.num_tokens,
            cached=self._stream.num_cached_tokens,
            reasoning=sum(self._reasoning.values()),
        )

    async def deltas(self) -> AsyncGenerator[AnswerDelta, None]:
        """The deltas; raises for an answer that fails. Leaving early aborts the request."""
        started = time.perf_counter()
        first: float | None = None
        async with aclosing(self._stream) as stream:
            async for delta in stream:
                if first is None and delta.token_ids:
                    first = time.perf_counter()
                self._count(len(delta.token_ids))
                self._reasoning[delta.index] = delta.num_reasoning_tokens
                self._assert_sound(delta)
                yield delta
        if first is not None:
            total_s = time.perf_counter() - started
            self._metrics.count_answer(first - started, total_s, self.num_tokens)

    def _assert_sound(self, delta: AnswerDelta) -> None:
        """Raise for an answer that failed or was aborted; only a grammar is the client's fault."""
        if delta.finish_reason is FinishReason.ERROR:
            if delta.failure is FailureKind.GRAMMAR:
                raise invalid_request(
                    f"{self._grammar_source} could not be followed to the end: {delta.error}",
                    self._grammar_source,
                )
            raise APIError(500, f"the answer failed: {delta.error}", code="engine_error")
        if delta.finish_reason is FinishReason.ABORT:
            raise APIError(
                503,
                "the server is shutting down and the answer was not finished; ask again when it "
                "is back",
                code="aborted",
                headers={"Retry-After": "5"},
            )

    def _count(self, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self._notes["completion_tokens"] = self._notes.get("completion_tokens", 0) + num_tokens

    async def whole(self) -> RequestOutput:
        """Wait for the end and return the complete output."""
        async with aclosing(self.deltas()) as deltas:
            async for _ in deltas:
                pass
        return self.output()

    def output(self) -> RequestOutput:
        """The complete output, after all deltas have been read."""
        return self._stream.output()

    async def stop(self) -> None:
        """Abort the request."""
        await self._stream.aclose()


def finish_of(reason: FinishReason | None, arguments: Sequence[str]) -> str:
    """OpenAI's `finish_reason` of an answer; `arguments` are those of its calls.

    It is `tool_calls` only if all arguments are complete JSON: a call that was cut off cannot be
    executed.
    """
    if reason is FinishReason.STOP and arguments and all(map(is_whole_json, arguments)):
        return "tool_calls"
    return "length" if reason is FinishReason.LENGTH else "stop"


def is_whole_json(text: str) -> bool:
    """Whether the arguments of a call can be parsed."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def new_id(kind: str) -> str:
    """A unique id, with the prefix of its kind."""
    return f"{kind}_{uuid.uuid4().hex}"
