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
    root: str
    """The model's name, or the directory of an adapter."""
    parent: str | None = None
    """The name of the base model, if this is an adapter."""
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self) -> dict[str, Any]:
        """The model's entry in the list of models."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "nemotron3",
            "root": self.root,
            "parent": self.parent,
            "max_model_len": self.llm.max_model_len,
        }

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


class ServedContexts:
    """A base model and its adapters, by the names that clients send."""

    def __init__(self, base: ServingContext, adapters: Sequence[ServingContext]) -> None:
        self.all = (base, *adapters)
        self._by_name = {context.model_name: context for context in self.all}

    def named(self, model: str | None) -> ServingContext:
        """The model of a request, the base model for None; refuses an unknown name."""
        if model is None:
            return self.all[0]
        if model not in self._by_name:
            names = ", ".join(map(repr, self._by_name))
            raise APIError(
                404,
                f"model is {model!r}; this server has {names}",
                "model",
                "model_not_found",
            )
        return self._by_name[model]


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
