"""Requests to the engine and its results, in token ids.

`SamplingParams` has the names of vLLM; `reasoning_budget` is vLLM's `thinking_token_budget`. All
values are checked on construction, before any work starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol

from jaxtyping import Int16
from torch import Tensor

from nemotron3.errors import ConfigError

MAX_LOGPROBS = 64
"""Most alternatives per token that a request may ask for."""


GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """The grammar or schema that an answer must follow; the reasoning before it is free."""

    kind: GrammarKind
    value: Any = None
    """The schema, regular expression, list of choices or Lark grammar; None for any JSON object."""
    source: str | None = field(default=None, compare=False)
    """The request's field from which it comes, for errors."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the answers to one request are sampled, and when they end."""

    n: int = 1
    """Number of answers; they share the prompt's state."""
    max_tokens: int | None = None
    """Most tokens of an answer; None for the rest of the context."""
    min_tokens: int = 0
    """The answer cannot end before it has this many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 chooses the most probable token."""
    top_p: float = 1.0
    """Keep the most probable tokens that together reach this probability."""
    top_k: int = 0
    """Keep this many most probable tokens; 0 (or vLLM's -1) for all."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the most probable one."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that occur in the answer."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of a token once for each of its occurrences in the answer."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer."""
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    """Added to the logits of single tokens."""
    seed: int | None = None
    """Seed of this request's sampling; None draws one."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer, besides those of the model."""
    include_stop_str_in_output: bool = False
    """Keep the stop string or stop token in the answer."""
    ignore_eos: bool = False
    """Do not stop at the model's own end tokens."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many most probable tokens."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    reasoning_budget: int | None = None
    """Most tokens of reasoning; None for no limit."""
    reasoning_grace: int = 0
    """Tokens beyond the budget during which reasoning may still end at a line end."""
    structured: StructuredOutput | None = None
    """The grammar or schema that the answer must follow."""

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
    """Raise ConfigError unless `holds`; in `bound`, `{other}` stands for a second field's name."""
    if not holds:
        raise ConfigError(f"is {value!r}; it must be {bound}", field=name, other=other)


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    """The model's end token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context."""
    ABORT = "abort"
    """The client cancelled the request."""
    ERROR = "error"
    """This request failed; other requests continue."""


class FailureKind(Enum):
    """The cause of `FinishReason.ERROR`: the request's grammar, or the engine."""

    GRAMMAR = "grammar"
    """The grammar allows no further token; the client may send another grammar."""
    ENGINE = "engine"
    """A step failed, or the model's logits are NaN; the request is not the cause."""


class TokenConstraint(Protocol):
    """The tokens that are allowed next in one answer; `accept` reports every token to it."""

    def mask(self) -> Tensor | None:
        """True for each allowed token, [vocab]; None if all are allowed.

        Raises DataError if none is: the answer then fails with `FailureKind.GRAMMAR`.
        """
        ...

    def accept(self, token: int) -> None:
        """Advance by the token that was chosen."""
        ...

    def fork(self) -> "TokenConstraint":
        """An independent copy, to look ahead along drafted tokens."""
        ...


class StopCondition(Protocol):
    """Decides, token by token, whether an answer is finished (stop strings need text)."""

    def ends_at(self, token: int) -> bool:
        """Advance by the token that was chosen; returns whether the answer ends with it."""
        ...


class TokenLogprob(NamedTuple):  # an answer has one for each token
    """A token's log-probability under the model itself (before temperature and penalties)."""

    token: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and their log-probabilities, if the request asks for them."""
    weight_version: int = 0
    """Version of the weights that computed them."""


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """The results of a request's prefill."""

    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    logprobs: Sequence[TokenLogprob | None] = ()
    """One for each prompt token (None for the first), if the request asks for them."""


@dataclass(frozen=True)
class TokenDelta:
    """The tokens that one step of the engine adds to one answer."""

    request_id: str
    index: int
    """Index among the n answers."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    failure: FailureKind | None = None
    """The kind of the error, if the answer failed."""
    stop_token: int | None = None
    """The token that ended the answer, if one did; it is the last of `tokens`."""
    prompt: PromptReport | None = None
    """The report on the prompt, in the first delta only."""
    num_drafted: int = 0
    """Tokens drafted for this answer so far."""
    num_accepted: int = 0
    """Accepted drafts that are part of the answer so far."""
    weight_version: int = 0
    """Version of the weights with which the tokens were sampled."""
    continues_old_states: bool = False
    """Whether the tokens were sampled from states that earlier weights have computed a part of."""
    routed_experts: Int16[Tensor, "tokens layer choice"] | None = None
    """The experts of prompt and answer without the last token, which was never an input of the
    model. Only in the last delta, with `EngineConfig(return_routed_experts=True)`."""
