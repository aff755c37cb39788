"""/v1/completions: texts or token ids in, their continuation out.

Several prompts are several requests of the engine side by side; their answers are numbered through.
`echo` puts the prompt before the answer, with its log-probabilities where any are asked for; with
`max_tokens: 0` it is the prompt alone, which is how harnesses measure what a text is worth.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from nemotron3.inference.answers import AnswerDelta, CompletionOutput, Prompt, RequestOutput
from nemotron3.inference.requests import SamplingParams
from nemotron3.server.answering import Answering, Desk, finish_of
from nemotron3.server.completion_bodies import CompletionBody
from nemotron3.server.length import assert_fits
from nemotron3.server.logprobs import CompletionLogprobs, prompt_logprobs
from nemotron3.server.refusals import RefusedError, invalid
from nemotron3.server.sampling import (
    NO_DEFAULTS,
    budget_name,
    reasoning_budget,
    sampling_params,
    structured_output,
)
from nemotron3.server.streaming import DONE, event
from nemotron3.server.usage import Usage, usage_of
from nemotron3.text import ContentDelta

T = TypeVar("T")

_DEFAULT_MAX_TOKENS = 16  # OpenAI's


def plan_completion(
    body: CompletionBody, defaults: Mapping[str, Any] = NO_DEFAULTS
) -> SamplingParams:
    """What the body asks for, beside the model's defaults; raises where it contradicts itself."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is for streams; send stream: true", "stream_options")
    if body.stream and (body.echo or body.prompt_logprobs is not None):
        name = "echo" if body.echo else "prompt_logprobs"
        raise invalid(f"{name} is not part of a stream; leave one of them out", name)
    most = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if most == 0 and not body.echo:
        raise invalid("max_tokens is 0; ask for at least one token, or for echo", "max_tokens")
    echoed = body.logprobs if body.echo else None
    return sampling_params(
        body,
        defaults,
        names={"reasoning_budget": budget_name(body, None)},
        n=body.n,
        max_tokens=max(most, 1) if most >= 0 else most,
        logprobs=body.logprobs,
        prompt_logprobs=echoed if body.prompt_logprobs is None else body.prompt_logprobs,
        reasoning_budget=reasoning_budget(body, None),
        structured=structured_output(body.structured_outputs),
    )


async def completion_prompts(desk: Desk, body: CompletionBody) -> list[Prompt]:
    """The prompts, cut into tokens and measured."""
    given = _prompts_of(body.prompt)
    prompts: list[Prompt] = []
    for one in given:
        if isinstance(one, str):
            prompts.append(await desk.prepare_text(one))
        else:
            prompts.append(desk.llm.prepare_ids(one))
        size = len(prompts[-1].ids)
        assert_fits(size, body.max_tokens, desk.llm.max_model_len, "prompt", "max_tokens")
    return prompts


def _prompts_of(
    given: str | list[str] | list[int] | list[list[int]],
) -> Sequence[str | Sequence[int]]:
    """One or many prompts as many."""
    if not given:
        raise invalid("prompt is empty; give a text or token ids", "prompt")
    if isinstance(given, str):
        return [given]
    ids = [token for token in given if isinstance(token, int)]
    return [ids] if ids else [one for one in given if not isinstance(one, int)]


class CompletionAnswer:
    """The answers to all prompts of one request, whole or as a stream."""

    def __init__(
        self,
        desk: Desk,
        body: CompletionBody,
        params: SamplingParams,
        answerings: Sequence[Answering],
    ) -> None:
        self._tokenizer = desk.llm.tokenizer
        self._body = body
        self._n = params.n
        self._answerings = answerings
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": desk.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer's JSON."""
        outputs = await _together([answering.whole() for answering in self._answerings])
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
        """The answers' stream, those of several prompts mixed as they come."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        is_continuous = options is not None and bool(options.continuous_usage_stats)
        arrived: asyncio.Queue[tuple[int, AnswerDelta] | None] = asyncio.Queue()

        async def pump(i: int, answering: Answering) -> None:
            async with aclosing(answering.deltas()) as deltas:
                async for delta in deltas:
                    arrived.put_nowait((i, delta))

        async def pump_all() -> None:
            try:
                await _together([pump(i, each) for i, each in enumerate(self._answerings)])
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
                usage = self._usage([answering.output() for answering in self._answerings])
                yield event({**self._head, "choices": [], "usage": usage.body()})
        except RefusedError as error:
            yield event(error.body())
        finally:
            pumping.cancel()
            await asyncio.gather(pumping, return_exceptions=True)
        yield DONE

    async def stop(self) -> None:
        """Give all of it up."""
        for answering in self._answerings:
            await answering.stop()

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
            choice |= {"token_ids": list(ids), "prompt_token_ids": list(output.prompt.ids)}
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
        return {**self._head, "choices": [choice]}

    def _usage_so_far(self) -> Usage:
        return sum((each.usage_so_far() for each in self._answerings), Usage(prompt=0))

    def _usage(self, outputs: Sequence[RequestOutput]) -> Usage:
        usage = sum(map(usage_of, outputs), Usage(prompt=0))
        is_bare = self._body.max_tokens == 0
        return Usage(prompt=usage.prompt, cached=usage.cached) if is_bare else usage


async def _together(jobs: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run jobs side by side; where one fails, the others are cancelled."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
