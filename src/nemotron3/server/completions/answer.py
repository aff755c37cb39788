"""The texts that continue prompts, complete or as a stream.

Each prompt is a request of its own in the engine, and they run concurrently. A choice's `index`
counts the answers over all prompts.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from nemotron3.inference.output_processor import AnswerDelta, CompletionOutput, RequestOutput
from nemotron3.inference.requests import SamplingParams
from nemotron3.server.completions.body import CompletionBody
from nemotron3.server.generation.logprobs import CompletionLogprobs, prompt_logprobs
from nemotron3.server.generation.serving import RequestHandle, ServingContext, finish_of
from nemotron3.server.generation.token_ids import routed_experts
from nemotron3.server.generation.usage import Usage, usage_of
from nemotron3.server.http.errors import APIError
from nemotron3.server.http.streaming import DONE, event
from nemotron3.text import ContentDelta

T = TypeVar("T")


class CompletionAnswer:
    """The answers to all prompts of one request, complete or as a stream."""

    def __init__(
        self,
        serving: ServingContext,
        body: CompletionBody,
        params: SamplingParams,
        handles: Sequence[RequestHandle],
    ) -> None:
        self._tokenizer = serving.llm.tokenizer
        self._body = body
        self._n = params.n
        self._handles = handles
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": serving.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer's JSON."""
        outputs = await _together([handle.whole() for handle in self._handles])
        return {
            **self._head,
            "choices": [
                self._choice(i * self._n + answer.index, output, answer)
                for i, output in enumerate(outputs)
                for answer in output.outputs
            ],
            "usage": self._usage(outputs).body(),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The stream of the answers, those of several prompts interleaved."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        is_continuous = options is not None and bool(options.continuous_usage_stats)
        arrived: asyncio.Queue[tuple[int, AnswerDelta] | None] = asyncio.Queue()

        async def pump(i: int, handle: RequestHandle) -> None:
            async with aclosing(handle.deltas()) as deltas:
                async for delta in deltas:
                    arrived.put_nowait((i, delta))

        async def pump_all() -> None:
            try:
                await _together([pump(i, each) for i, each in enumerate(self._handles)])
            finally:
                arrived.put_nowait(None)

        pumping = asyncio.create_task(pump_all())
        try:
            while (item := await arrived.get()) is not None:
                chunk = self._chunk(item[0] * self._n + item[1].index, item[1])
                if chunk is None:
                    continue
                if with_usage:
                    chunk["usage"] = self._usage_so_far().body() if is_continuous else None
                yield event(chunk)
            await pumping
            if with_usage:
                usage = self._usage([handle.output() for handle in self._handles])
                yield event({**self._head, "choices": [], "usage": usage.body()})
        except APIError as error:
            yield event(error.body())
        finally:
            pumping.cancel()
            await asyncio.gather(pumping, return_exceptions=True)
        yield DONE

    async def stop(self) -> None:
        """Abort all requests."""
        for handle in self._handles:
            await handle.stop()

    def _choice(
        self, index: int, output: RequestOutput, answer: CompletionOutput
    ) -> dict[str, Any]:
        is_bare = self._body.max_tokens == 0
        text = "" if is_bare else answer.text
        ids = () if is_bare else answer.token_ids
        if self._body.echo:
            text = self._tokenizer.decode(output.prompt.ids) + text
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": finish_of(answer.finish_reason, ()),
            "stop_reason": answer.stop_reason,
        }
        if self._body.logprobs is not None:
            shown = CompletionLogprobs(self._tokenizer)
            pieces: list[dict[str, Any]] = []
            if self._body.echo:
                pieces.append(shown.of_prompt(output.prompt.ids, output.prompt_logprobs))
            pieces.append(shown.of_answer(() if is_bare else answer.logprobs))
            choice["logprobs"] = {
                name: [value for piece in pieces for value in piece[name]] for name in pieces[0]
            }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, output.prompt_logprobs)
        if self._body.return_token_ids:
            choice |= {
                "token_ids": list(ids),
                "weight_versions": list(answer.weight_versions[: len(ids)]),
                "prompt_token_ids": list(output.prompt.ids),
            }
        if self._body.return_routed_experts:
            choice["routed_experts"] = routed_experts(answer)
        return choice

    def _chunk(self, index: int, delta: AnswerDelta) -> dict[str, Any] | None:
        text = "".join(part.text for part in delta.parts if isinstance(part, ContentDelta))
        if not (text or delta.token_ids or delta.finish_reason):
            return None
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": delta.stop_reason,
        }
        if delta.finish_reason is not None:
            choice["finish_reason"] = finish_of(delta.finish_reason, ())
        if self._body.logprobs is not None and delta.logprobs:
            if index not in self._logprobs:
                self._logprobs[index] = CompletionLogprobs(self._tokenizer)
            choice["logprobs"] = self._logprobs[index].of_answer(delta.logprobs)
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
            choice["weight_versions"] = list(delta.weight_versions)
        return {**self._head, "choices": [choice]}

    def _usage_so_far(self) -> Usage:
        return sum((each.usage_so_far() for each in self._handles), Usage(prompt=0))

    def _usage(self, outputs: Sequence[RequestOutput]) -> Usage:
        usage = sum(map(usage_of, outputs), Usage(prompt=0))
        is_bare = self._body.max_tokens == 0
        return Usage(prompt=usage.prompt, cached=usage.cached) if is_bare else usage


async def _together(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run jobs concurrently; if one fails, the others are cancelled."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
