"""From the engine's tokens to text, reasoning, content and tool calls, streamed.

There is an `OutputProcessor` for each answer and a `RequestOutputProcessor` for each request. It
holds back text that may become a stop string, removes the token that ended the answer, and passes
all other tokens to the parsers of `nemotron3.text`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Int16
from torch import Tensor

from nemotron3.inference.requests import (
    FailureKind,
    FinishReason,
    PromptReport,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)
from nemotron3.inference.sampling.stop_strings import StopStrings
from nemotron3.inference.sampling.thinking_budget import ThinkingBudget
from nemotron3.text import (
    ContentDelta,
    IncrementalDetokenizer,
    ParsedCall,
    ResponseParser,
    Tokenizer,
    Tool,
)
from nemotron3.text.response import ResponseDelta


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt in token ids. The answer to a chat is parsed into reasoning, content and calls."""

    ids: tuple[int, ...]
    is_chat: bool = False
    is_reasoning_open: bool = False
    """Whether the prompt ends inside a `<think>` block."""
    tools: tuple[Tool, ...] = ()
    force_nonempty_content: bool = False
    """Return the reasoning as the content if the content would be empty."""


@dataclass(frozen=True)
class DraftStats:
    """Tokens drafted for an answer, and how many of them were accepted."""

    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, kw_only=True)
class AnswerDelta:
    """The next part of one answer."""

    index: int
    parts: tuple[ResponseDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    weight_versions: tuple[int, ...] = ()
    """The version of the weights that sampled each token."""
    logprobs: tuple[TokenLogprob, ...] = ()
    content_logprobs: tuple[TokenLogprob, ...] = ()
    """Log-probabilities of the tokens of a chat's content; a token's text may come in a later
    delta."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token that ended the answer; None for the model's own end."""
    num_reasoning_tokens: int = 0
    """Reasoning tokens of this answer so far."""
    error: str | None = None
    failure: FailureKind | None = None


@dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One complete answer."""

    index: int
    text: str
    """All text, including reasoning and calls, without special tokens."""
    token_ids: tuple[int, ...]
    weight_versions: tuple[int, ...]
    """The version of the weights that sampled each token."""
    logprobs: tuple[TokenLogprob, ...]
    content_logprobs: tuple[TokenLogprob, ...]
    """Log-probabilities of the tokens of a chat's content."""
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    reasoning: str
    content: str
    """The text without reasoning and calls."""
    tool_calls: tuple[ParsedCall, ...]
    num_reasoning_tokens: int
    """Tokens that the model generated between the tags of its reasoning, without the tokens that a
    budget forced."""
    acceptance: DraftStats
    continues_old_states: bool = False
    """Whether an update with `running="keep"` left tokens of it with states of earlier weights."""
    routed_experts: Int16[Tensor, "tokens layer choice"] | None = None
    """The experts of every token of prompt and answer except the last, which was never an input of
    the model; only with `EngineConfig(return_routed_experts=True)`."""
    error: str | None = None
    failure: FailureKind | None = None


@dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """All answers to a request."""

    request_id: str
    prompt: Prompt
    prompt_logprobs: Sequence[TokenLogprob | None] = ()
    outputs: tuple[CompletionOutput, ...] = ()
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    first_token_s: float | None = None
    """Seconds from the request to its first token."""
    total_s: float = 0.0
    """Seconds from the request to its last token."""


@dataclass(eq=False)
class OutputProcessor:
    """Processes the tokens of one answer; without a tokenizer it collects ids only.

    Whoever streams calls `push` for each step, others `collect`: the answer is then read at its
    end, in one go.
    """

    prompt: Prompt
    params: SamplingParams
    tokenizer: Tokenizer | None
    index: int
    eos_ids: frozenset[int] = frozenset()
    """The model's own end tokens."""
    budget: ThinkingBudget | None = None
    """The reasoning budget, if there is one: it determines which tokens were forced."""
    report: PromptReport | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    failure: FailureKind | None = None
    routed_experts: Int16[Tensor, "tokens layer choice"] | None = None
    _tokens: list[int] = field(default_factory=list[int])
    _versions: list[int] = field(default_factory=list[int])
    _continues_old_states: bool = False
    _logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    _unread: list[int] = field(default_factory=list[int])
    _is_ended: bool = False
    _text: list[str] = field(default_factory=list[str])
    _num_drafted: int = 0
    _num_accepted: int = 0
    _stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        self._stop: StopStrings | None = None
        self._parser: ResponseParser | None = None
        self._counter: ResponseParser | None = None
        """Counts reasoning tokens: the chat's parser, or one of its own for a text completion."""
        if self.tokenizer is None:
            return
        self._stop = StopStrings(self.tokenizer, self.params, is_chat=self.prompt.is_chat)
        self._detokenizer = IncrementalDetokenizer(self.tokenizer, skip_special_tokens=True)
        if self.prompt.is_chat or self.prompt.is_reasoning_open or self.budget is not None:
            self._counter = ResponseParser(
                self.tokenizer,
                is_reasoning_open=self.prompt.is_reasoning_open,
                tools=self.prompt.tools,
                force_nonempty_content=self.prompt.force_nonempty_content,
            )
        self._parser = self._counter if self.prompt.is_chat else None

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self._tokens)

    @property
    def num_reasoning_tokens(self) -> int:
        """Reasoning tokens so far, without forced ones."""
        return self._counter.num_reasoning_tokens if self._counter is not None else 0

    def collect(self, delta: TokenDelta) -> None:
        """Take the tokens of a step, to be read later."""
        shown = delta.tokens
        self._tokens += shown
        self._versions += (delta.weight_version,) * len(shown)
        self._continues_old_states |= delta.continues_old_states
        self._logprobs += delta.logprobs
        self._num_drafted, self._num_accepted = delta.num_drafted, delta.num_accepted
        self.finish_reason = delta.finish_reason
        self.error, self.failure = delta.error, delta.failure
        self.routed_experts = delta.routed_experts
        if delta.prompt is not None:
            self.report = delta.prompt
        if delta.stop_token is not None:
            if delta.stop_token not in self.eos_ids:
                self._stop_reason = delta.stop_token
            if not self.params.include_stop_str_in_output:
                shown = shown[:-1]
        self._unread += shown

    def push(self, delta: TokenDelta) -> AnswerDelta:
        """Process the tokens of a step; returns the parts of the answer that can be shown."""
        self.collect(delta)
        num_before = len(self._content_places)
        parts = self._read_collected()
        return AnswerDelta(
            index=self.index,
            parts=tuple(parts),
            token_ids=delta.tokens,
            weight_versions=(delta.weight_version,) * len(delta.tokens),
            logprobs=delta.logprobs,
            content_logprobs=self._content_logprobs(num_before),
            finish_reason=delta.finish_reason,
            stop_reason=self._stop_reason,
            num_reasoning_tokens=self.num_reasoning_tokens,
            error=delta.error,
            failure=delta.failure,
        )

    def output(self) -> CompletionOutput:
        """The complete answer; to be called after it has finished."""
        self._read_collected()
        text = "".join(self._text)
        response = self._parser.response() if self._parser is not None else None
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=tuple(self._tokens),
            weight_versions=tuple(self._versions),
            continues_old_states=self._continues_old_states,
            logprobs=tuple(self._logprobs),
            content_logprobs=self._content_logprobs(0),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            reasoning=response.reasoning if response is not None else "",
            content=response.content if response is not None else text,
            tool_calls=response.tool_calls if response is not None else (),
            num_reasoning_tokens=self.num_reasoning_tokens,
            acceptance=DraftStats(self._num_drafted, self._num_accepted),
            routed_experts=self.routed_experts,
            error=self.error,
            failure=self.failure,
        )

    def _read_collected(self) -> list[ResponseDelta]:
        if self._stop is None:
            return []
        tokens, self._unread = self._unread, []
        parts = self._read(self._stop.push(tokens))
        if self.finish_reason is not None and not self._is_ended:
            self._is_ended = True
            parts += self._finish(self._stop)
        return parts

    def _finish(self, stop: StopStrings) -> list[ResponseDelta]:
        parts = self._read(stop.finish())
        tail = self._detokenizer.finish()
        if stop.matched is not None:
            self._stop_reason = stop.matched
            tail = stop.rest  # it includes an incomplete character before the stop string
            if self._counter is not None:
                unshown = self._tokens[self._counter.num_ids :]
                self._counter.count_unshown(t for t in unshown if not self._is_forced(t))
            if self._parser is not None:
                parts += self._parser.push_text(tail)
        ending = [] if self._counter is None else self._counter.finish()
        if self._parser is None:
            return parts + self._show(tail)
        self._text.append(tail)
        return [*parts, *ending]

    def _read(self, tokens: Sequence[int]) -> list[ResponseDelta]:
        text, counter = self._detokenizer.push(tokens), self._counter
        if counter is None:
            return self._show(text)
        parts: list[ResponseDelta] = []
        if self.budget is None:
            parts = counter.push(tokens)
        else:
            for token in tokens:
                parts += counter.push([token], is_forced=self._is_forced(token))
        if self._parser is None:
            return self._show(text)
        self._text.append(text)
        return parts

    def _is_forced(self, token: int) -> bool:
        """Advance the budget by the next token; returns whether the budget had forced it."""
        if self.budget is None:
            return False
        forced = self.budget.forced()
        self.budget.accept(token)
        return forced is not None

    @property
    def _content_places(self) -> list[int]:
        """Places of the tokens of a chat's content; a text completion has only content."""
        return self._parser.content_places if self._parser is not None else []

    def _content_logprobs(self, first: int) -> tuple[TokenLogprob, ...]:
        """Log-probabilities of the content, from its token number `first` on."""
        if not self._logprobs:
            return ()
        return tuple([self._logprobs[place] for place in self._content_places[first:]])

    def _show(self, text: str) -> list[ResponseDelta]:
        self._text.append(text)
        return [ContentDelta(text)] if text else []


class RequestOutputProcessor:
    """The processors of all answers to one request, and the times of its tokens."""

    def __init__(self, request_id: str, prompt: Prompt, each: Sequence[OutputProcessor]) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.each = each
        self._start_s = time.monotonic()
        self._first_s: float | None = None
        self._last_s = self._start_s

    @property
    def is_finished(self) -> bool:
        """Whether every answer has finished."""
        return all(answer.finish_reason is not None for answer in self.each)

    @property
    def report(self) -> PromptReport | None:
        """The report on the prompt; None before the first tokens."""
        return self.each[0].report

    def collect(self, delta: TokenDelta) -> None:
        """Take the tokens of a step for one of the answers, to be read later."""
        self._note_time(delta)
        self.each[delta.index].collect(delta)

    def push(self, delta: TokenDelta) -> AnswerDelta:
        """Process the tokens of a step for one of the answers."""
        self._note_time(delta)
        return self.each[delta.index].push(delta)

    def output(self) -> RequestOutput:
        """All answers; complete after they have finished."""
        report = self.report or PromptReport()
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_logprobs=report.logprobs,
            outputs=tuple(answer.output() for answer in self.each),
            num_cached_tokens=report.num_cached_tokens,
            first_token_s=None if self._first_s is None else self._first_s - self._start_s,
            total_s=self._last_s - self._start_s,
        )

    def _note_time(self, delta: TokenDelta) -> None:
        self._last_s = time.monotonic()
        if delta.tokens and self._first_s is None:
            self._first_s = self._last_s
