"""A request to the engine, and the state of one answer to it while it is generated."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int16
from torch import Tensor

from nemotron3.inference.requests import (
    FinishReason,
    PromptReport,
    SamplingParams,
    StopCondition,
    TokenConstraint,
    TokenDelta,
    TokenLogprob,
)
from nemotron3.inference.sampling.sampler import TokenChooser
from nemotron3.inference.sampling.thinking_budget import ThinkingBudget


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """A request in token ids. The factories make a stop condition, a budget and a constraint for
    each of its n answers."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    boundaries: tuple[int, ...] = ()
    """Prompt lengths at which other prompts may diverge: the beginnings of messages. The states
    there are cached."""
    is_streamed: bool = True
    """Whether somebody reads the tokens of every step; if not, they come in few deltas."""
    may_be_continued: bool = True
    """Whether other prompts may begin with tokens of this one or of its answers. If not, none of
    its states is cached: they would cost time and memory for nothing."""
    make_stop: Callable[[], StopCondition | None] = lambda: None
    make_budget: Callable[[], ThinkingBudget | None] = lambda: None
    make_constraint: Callable[[], TokenConstraint | None] = lambda: None


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One answer. `tokens` are those of prompt and answer; its slot of the `HybridCache` contains
    the first ones of them."""

    request: EngineRequest
    index: int
    chooser: TokenChooser
    stop: StopCondition | None
    tokens: list[int]
    order: int
    """Order of arrival: earlier sequences are scheduled first and preempted last."""
    max_tokens: int
    slot: int | None = None
    is_prefilled: bool = False
    """Whether the state contains all tokens but the last."""
    prompt_end: Float[Tensor, " d_model"] | None = None
    """Hidden state after a prompt that another answer has read, until the first token is chosen."""
    is_stale: bool = False
    """Whether a part of the state was computed by weights that have been replaced."""
    drafts: list[int] = field(default_factory=list[int])
    num_cached_tokens: int = 0
    """Tokens found in the prefix cache; after a preemption, the smallest number of all starts."""
    num_drafted: int = 0
    num_accepted: int = 0
    """Accepted drafts that are part of the answer."""
    num_preemptions: int = 0
    is_reported: bool = False
    """Whether the `PromptReport` has been returned; the first delta has it."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list[TokenLogprob | None])
    """One for each prompt token that the state contains, and for the token after them."""
    routes: list[Int16[Tensor, "tokens layer choice"]] = field(default_factory=list[Tensor])
    """The experts of the tokens that the state contains, if the engine returns them."""
    finish_reason: FinishReason | None = None
    unsent: list[int] = field(default_factory=list[int])
    """Tokens that are not in a delta yet."""
    unsent_logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    unsent_version: int = 0
    """Version of the weights that sampled them."""
    unsent_is_stale: bool = False
    """Whether one of them was sampled from a stale state."""

    def begin(self, slot: int, num_read: int) -> None:
        """Start, or start again after a preemption, in a slot that contains `num_read` tokens.

        Results that were collected with an earlier state (drafts, experts, log-probabilities of the
        prompt) are dropped, since they are collected again.
        """
        self.slot = slot
        self.is_stale = self.is_prefilled = False
        self.drafts.clear()
        self.routes.clear()
        first = self.num_preemptions == 0
        self.num_cached_tokens = num_read if first else min(self.num_cached_tokens, num_read)
        if self.wants_prompt_logprobs:
            assert num_read == 0, "prompt_logprobs need the whole prompt to be computed"
            self.prompt_logprobs = [None]

    def take_prompt_end(self) -> Float[Tensor, " d_model"]:
        """The hidden state of which the first token is chosen now."""
        end, self.prompt_end = self.prompt_end, None
        assert end is not None, f"{self.request_id} reads its prompt itself"
        self.is_prefilled = True
        return end

    def take_delta(
        self, reason: FinishReason | None = None, stop_token: int | None = None
    ) -> TokenDelta:
        """The tokens that no earlier delta has; the first delta has the report on the prompt."""
        report = None
        if not self.is_reported:
            self.is_reported = True
            report = PromptReport(
                num_cached_tokens=self.num_cached_tokens, logprobs=tuple(self.prompt_logprobs)
            )
        delta = TokenDelta(
            request_id=self.request.request_id,
            index=self.index,
            tokens=tuple(self.unsent),
            logprobs=tuple(self.unsent_logprobs),
            finish_reason=reason,
            stop_token=stop_token,
            prompt=report,
            error=self.chooser.error,
            failure=self.chooser.failure,
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            weight_version=self.unsent_version,
            continues_old_states=self.unsent_is_stale,
            routed_experts=None if reason is None else self.routed_experts(),
        )
        self.unsent.clear()
        self.unsent_logprobs.clear()
        self.unsent_is_stale = False
        return delta

    def routed_experts(self) -> Int16[Tensor, "tokens layer choice"] | None:
        """The experts of all tokens but the last, which was never an input of the model."""
        if not self.routes:
            return None
        return torch.cat(self.routes)[: len(self.tokens) - 1]

    @property
    def running_slot(self) -> int:
        """Its slot, which only a running sequence has."""
        assert self.slot is not None, f"{self.request_id} does not run"
        return self.slot

    @property
    def request_id(self) -> str:
        """Id of the request."""
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are requested and not yet reported."""
        return self.request.params.prompt_logprobs is not None and not self.is_reported
