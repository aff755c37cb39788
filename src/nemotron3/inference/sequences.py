"""One answer while it is being written: its tokens, its place in the state, its rules."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Int16
from torch import Tensor

from nemotron3.inference.requests import (
    FinishReason,
    SamplingParams,
    StopCondition,
    TokenConstraint,
    TokenLogprob,
)
from nemotron3.inference.sampling.sampler import TokenChooser
from nemotron3.inference.sampling.thinking_budget import ThinkingBudget


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """A request in token ids. Each of its n answers gets rules of its own from the factories."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    boundaries: tuple[int, ...] = ()
    """Lengths of the prompt at which another one may part from it: ends of messages."""
    make_stop: Callable[[], StopCondition | None] = lambda: None
    make_budget: Callable[[], ThinkingBudget | None] = lambda: None
    make_constraint: Callable[[], TokenConstraint | None] = lambda: None


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One answer. `tokens` are prompt and answer; the state holds the first `length` of them."""

    request: EngineRequest
    index: int
    chooser: TokenChooser
    stop: StopCondition | None
    tokens: list[int]
    order: int
    """Of arrival: who came first is served first, and preempted last."""
    max_tokens: int
    slot: int | None = None
    is_prefilled: bool = False
    """Whether all tokens but the last one are in the state."""
    is_stale: bool = False
    """Whether a part of the state was computed by weights that are no more."""
    drafts: list[int] = field(default_factory=list[int])
    num_cached_tokens: int = 0
    """Tokens that the state was not computed from for this answer, however often it was begun."""
    num_drafted: int = 0
    num_accepted: int = 0
    """Drafts that are part of the answer."""
    num_preemptions: int = 0
    is_reported: bool = False
    """Whether what was done with the prompt has been told, as it is with the first tokens."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list[TokenLogprob | None])
    """Of as many tokens of the prompt as the state holds, and the one after them."""
    routes: list[Int16[Tensor, "tokens layer choice"]] = field(default_factory=list[Tensor])
    """The experts chosen for the tokens that the state holds, where they are returned."""
    finish_reason: FinishReason | None = None

    def begin(self, slot: int, num_read: int) -> None:
        """Start, or start again, in a slot whose state holds `num_read` tokens.

        Whatever was gathered while another state was built goes with that state.
        """
        self.slot = slot
        self.is_stale = self.is_prefilled = False
        self.drafts.clear()
        self.routes.clear()
        first = self.num_preemptions == 0
        self.num_cached_tokens = num_read if first else min(self.num_cached_tokens, num_read)
        if self.wants_prompt_logprobs:
            assert num_read == 0, "a prompt that is scored is read from its beginning"
            self.prompt_logprobs = [None]

    def routed_experts(self) -> Int16[Tensor, "tokens layer choice"] | None:
        """The experts chosen for all tokens but the last, which nothing has read."""
        if not self.routes:
            return None
        return torch.cat(self.routes)[: len(self.tokens) - 1]

    @property
    def request_id(self) -> str:
        """The request that this is an answer to."""
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still to be told."""
        return self.request.params.prompt_logprobs is not None and not self.is_reported
