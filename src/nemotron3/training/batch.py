"""A microbatch: tokens, their targets, and the mask and weight of each target.

An objective that needs more of its data (log-probabilities of a sampler, pairs, rewards) extends
the record by a subclass with the fields it reads:

    @dataclass(frozen=True, kw_only=True)
    class RolloutBatch(TrainBatch):
        sampled_logprobs: Tensor
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from nemotron3.models.layout import SequenceLayout, shift_left
from nemotron3.models.routes import RecordedRoutes
from nemotron3.ops.segments import Segments


class DepthTargets(NamedTuple):
    """The targets of a microbatch at one depth of multi-token prediction."""

    targets: Tensor
    """Token ids, int64 [tokens]."""
    mask: Tensor
    """0 where there is no target, float32 [tokens]."""
    weights: Tensor | None
    """Factor of each target's loss, float32 [tokens]; None for 1."""


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """A packed stream of sequences with its targets."""

    tokens: Tensor
    """Input ids, int64 [tokens]."""
    targets: Tensor
    """The id after each token, int64 [tokens]."""
    mask: Tensor
    """1 where the target is trained and counted, 0 where not, float32 [tokens]."""
    segments: Segments
    """Where sequences begin."""
    prefixes: tuple[int, ...] = ()
    """Which of them the last ones continue (`SequenceLayout.prefixes`)."""
    weights: Tensor | None = None
    """Factor of each target's loss, float32 [tokens]; an advantage, so it may be negative. A
    target of weight 0 is counted all the same. None for 1."""
    routes: RecordedRoutes | None = None
    """Experts to use, such as those of the engine that sampled the tokens; None: the router's."""

    @cached_property
    def layout(self) -> SequenceLayout:
        """The layout of the model's call."""
        return SequenceLayout(self.segments, prefixes=self.prefixes)

    def at_depth(self, depth: int) -> DepthTargets:
        """Targets of an MTP depth, each with its own mask and weight; depth 0 is the main head's.

        Position i of depth k predicts token i + k + 1, where its sequence has one.
        """
        if depth == 0:
            return DepthTargets(self.targets, self.mask, self.weights)
        targets, mask, weights = (
            None if values is None else shift_left(values, self.segments, depth)[0]
            for values in (self.targets, self.mask, self.weights)
        )
        assert targets is not None
        assert mask is not None  # 0 where the sequence has ended
        return DepthTargets(targets, mask, weights)
