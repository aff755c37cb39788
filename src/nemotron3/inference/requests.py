"""What one asks of the engine and what it answers, in token ids.

`SamplingParams` has the names of vLLM, so that what is known of that engine is known of this one;
`reasoning_budget` is what vLLM calls `thinking_token_budget`. Everything is checked here, before
anything runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

from jaxtyping import Int16
from torch import Tensor

from nemotron3.errors import ConfigError

MAX_LOGPROBS = 64
"""Most alternatives that a request may ask for per token."""


GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """What the answer has to look like; the reasoning before it is free."""

    kind: GrammarKind
    value: Any = None
    """The schema, expression, list of choices or grammar (Lark); None for any object."""
    source: str | None = field(default=None, compare=False)
    """What the request calls it, for errors."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is answered."""

    n: int = 1
    """Answers to give; they share the prompt's state."""
    max_tokens: int | None = None
    """Most tokens to write; None for what the context holds."""
    min_tokens: int = 0
    """Tokens before which nothing ends the answer."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 (or vLLM's -1) for all."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the most probable one."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer holds already."""
    frequency_penalty: float = 0.0
    """Subtracted once for every time that the answer holds them."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to the logits of single tokens."""
    seed: int | None = None
    """Seed of this request's sampling; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, beside those of the model."""
    include_stop_str_in_output: bool = False
    """Keep the string that ended the answer."""
    ignore_eos: bool = False
    """Do not stop at the model's own end tokens."""
    logprobs: int | None = None
    """Report each token's log-probability, and that of so many most probable others."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    reasoning_budget: int | None = None
    """Most tokens of reasoning; None leaves the model to it."""
    reasoning_grace: int = 0
    """Tokens beyond the budget in which a line end is waited for before reasoning is closed."""
    structured: StructuredOutput | None = None
    """What the answer has to look like."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "top_k", max(self.top_k, 0) if self.top_k == -1 else self.top_k)
        _require(1 <= self.n <= 128, "n", self.n, "1 to 128 answers")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        if self.max_tokens is not None:
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens,
                     f"at most {{other}} ({self.max_tokens})", other="max_tokens")  # fmt: skip
        _require(0 <= self.temperature <= 100, "temperature", self.temperature, "0 to 100")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, name, value, "-2 to 2")
        _require(0 < self.repetition_penalty <= 100, "repetition_penalty", self.repetition_penalty,
                 "above 0 and at most 100")  # fmt: skip
        for token, bias in self.logit_bias.items():
            _require(-100 <= bias <= 100, f"logit_bias[{token}]", bias, "-100 to 100")
        _require(all(self.stop), "stop", self.stop, "strings that are not empty")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _require(0 <= value <= MAX_LOGPROBS, name, value, f"0 to {MAX_LOGPROBS}")
        if self.reasoning_budget is not None:
            _require(self.reasoning_budget >= 0, "reasoning_budget", self.reasoning_budget,
                     "0 or more tokens")  # fmt: skip
        _require(self.reasoning_grace >= 0, "reasoning_grace", self.reasoning_grace, "0 or more")
        if self.seed is not None:
            _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")


def _require(
    holds: bool,  # noqa: FBT001
    name: str,
    value: object,
    bound: str,
    other: str | None = None,
) -> None:
    """Raise where a bound does not hold; one that mentions a second field has `{other}` in it."""
    if not holds:
        raise ConfigError(f"is {value!r}; it must be {bound}", field=name, other=other)


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    """The model ended it, or a stop string or token did."""
    LENGTH = "length"
    """max_tokens, or the end of the context."""
    ABORT = "abort"
    """Whoever asked went away."""
    ERROR = "error"
    """Something in this request failed; the others go on."""


class FailureKind(Enum):
    """Whose an answer's failure is: what `FinishReason.ERROR` alone does not say."""

    GRAMMAR = "grammar"
    """The grammar leaves no token to go on with; another may."""
    ENGINE = "engine"
    """A step failed, or the model's logits are no numbers; the request is not to blame."""


class TokenConstraint(Protocol):
    """Which tokens may come next in one answer. It is told of every token that comes."""

    def mask(self) -> Tensor | None:
        """True for each token that may come next, [vocab]; None where all may.

        A DataError where none may: the answer ends as a `FailureKind.GRAMMAR`.
        """
        ...

    def accept(self, token: int) -> None:
        """Take the token that came."""
        ...

    def fork(self) -> "TokenConstraint":
        """An independent copy, to look ahead along drafted tokens."""
        ...


class StopCondition(Protocol):
    """Decides, token by token, whether an answer is over (stop strings need text)."""

    def ends_at(self, token: int) -> bool:
        """Take the token that came; whether the answer ends with it."""
        ...


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model itself (before temperature and penalties)."""

    token: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and their log-probabilities, where they were asked for."""
    weight_version: int = 0
    """Of the weights that they were computed with."""


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """What the engine did with a request's prompt."""

    num_cached_tokens: int = 0
    logprobs: Sequence[TokenLogprob | None] = ()
    """Of each prompt token (the first has none), where they were asked for."""


@dataclass(frozen=True)
class TokenDelta:
    """The tokens that one step of the engine brought to one answer."""

    request_id: str
    index: int
    """Which of the n answers."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    failure: FailureKind | None = None
    """Of what kind the error is, where the answer failed."""
    stop_token: int | None = None
    """The token that ended the answer, where one did; it is the last of `tokens`."""
    prompt: PromptReport | None = None
    """With the first tokens: what was done with the prompt."""
    num_drafted: int = 0
    """Tokens drafted for this answer so far."""
    num_accepted: int = 0
    """Drafts that are part of the answer so far."""
    weight_version: int = 0
    """Of the weights that the tokens were sampled with."""
    routed_experts: Int16[Tensor, "tokens layer choice"] | None = None
    """With the end, where they are returned: the experts of prompt and answer, without the last
    token, which no layer has read."""
