"""Requests served together with others, and all outputs of their answers, for comparisons."""

from dataclasses import dataclass

from nemotron3.inference.engine import Engine
from nemotron3.inference.frontend import Frontend
from nemotron3.inference.output_processor import (
    CompletionOutput,
    Prompt,
    RequestOutput,
    RequestOutputProcessor,
)
from nemotron3.inference.requests import FinishReason, SamplingParams, TokenLogprob


@dataclass(frozen=True)
class Ask:
    """A request, the step at which it arrives, and the step at which it is aborted."""

    prompt: Prompt
    params: SamplingParams
    arrives: int = 0
    leaves: int | None = None
    """The step after which it is aborted."""


def serve(engine: Engine, frontend: Frontend, asks: list[Ask]) -> list[RequestOutput]:
    """All outputs of the answers, by request."""
    answers: dict[str, RequestOutputProcessor] = {}
    waiting, step = dict(enumerate(asks)), 0
    while waiting or engine.has_work:
        for number, ask in list(waiting.items()):
            if ask.arrives <= step:
                name = str(number)
                engine.add(frontend.request(ask.prompt, ask.params, name))
                answers[name] = frontend.output_processor(ask.prompt, ask.params, name)
                del waiting[number]
        for progress in engine.step():
            answers[progress.request_id].push(progress)
        for number, ask in enumerate(asks):
            if ask.leaves == step:
                for progress in engine.abort(str(number)):
                    answers[progress.request_id].push(progress)
        step += 1
        assert step < 3000, "the engine makes no progress"
    return [answers[str(number)].output() for number in range(len(asks))]


def assert_same(output: RequestOutput, alone: RequestOutput, *, tolerance: float) -> None:
    """Assert that all outputs of a request are equal; an aborted one has the beginning of them."""
    for answer, expected in zip(output.outputs, alone.outputs, strict=True):
        if answer.finish_reason is FinishReason.ABORT:
            count = len(answer.token_ids)
            assert answer.token_ids == expected.token_ids[:count]
            assert_close(answer.logprobs, expected.logprobs[:count], tolerance)
            continue
        assert told(answer) == told(expected)
        assert_close(answer.logprobs, expected.logprobs, tolerance)
        assert_close(answer.content_logprobs, expected.content_logprobs, tolerance)
    if any(answer.token_ids for answer in output.outputs[:1]):
        assert len(output.prompt_logprobs) == len(alone.prompt_logprobs)
        assert output.prompt_logprobs[:1] in ((), (None,))
        assert_close(output.prompt_logprobs[1:], alone.prompt_logprobs[1:], tolerance)


def told(answer: CompletionOutput) -> dict[str, object]:
    """The outputs of an answer that must be equal for every schedule."""
    return {
        name: getattr(answer, name)
        for name in (
            "token_ids", "text", "reasoning", "content", "tool_calls", "finish_reason",
            "stop_reason", "num_reasoning_tokens", "error", "failure",
        )
    }  # fmt: skip


def assert_close(ours, theirs, tolerance: float) -> None:
    """Assert equal tokens, log-probabilities and alternatives, up to rounding."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, TokenLogprob)
        assert (a.token, len(a.top)) == (b.token, len(b.top))
        assert abs(a.logprob - b.logprob) <= tolerance
        assert abs(a.rank - b.rank) <= 1  # of two that are equally probable but for rounding
        for (_, mine), (_, wanted) in zip(a.top, b.top, strict=True):
            assert abs(mine - wanted) <= tolerance
        either = dict(b.top)
        for token, logprob in a.top:
            assert token in either or abs(logprob - b.top[-1][1]) <= tolerance


def assert_counts(output: RequestOutput, engine: Engine, params: SamplingParams) -> None:
    """Assert the bounds of counts that depend on the schedule."""
    cached = output.num_cached_tokens
    assert 0 <= cached < len(output.prompt.ids)
    if engine.config.prefix_cache_bytes == 0 or params.prompt_logprobs is not None:
        assert cached == 0
    for answer in output.outputs:
        drafts = answer.acceptance
        assert 0 <= drafts.accepted <= drafts.drafted
        assert drafts.accepted <= len(answer.token_ids)
        if engine.config.max_draft_tokens == 0:
            assert drafts.drafted == 0
        assert answer.num_reasoning_tokens <= len(answer.token_ids)
        if params.reasoning_budget is not None:
            most = params.reasoning_budget + params.reasoning_grace
            assert answer.num_reasoning_tokens <= most
