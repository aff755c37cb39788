"""Decoding steps: a few new tokens of each of some sequences, again and again.

Whoever decodes (generation.py, the engine) calls `StepRunner.run` and need not know how the step is
carried out.

    steps = StepRunner(model, cache)
    out = steps.run([[token_of_3], [token_of_0]], [3, 0])
    out.logits[:, -1].argmax(-1)                              # next tokens of slots 3 and 0

The first step of each shape is the model's forward pass; where that can be recorded, those after it
are its recording (recordings.py), played on new tokens, slots and lengths.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.cache import HybridCache
from nemotron3.models.layout import MAX_STEPS, Places, SequenceLayout
from nemotron3.models.recordings import Recordings


class SteppingModel(Protocol):
    """What a step asks of a model."""

    def hidden_states(
        self, tokens: Tensor, *, layout: SequenceLayout, state: HybridCache
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class StepOutput(NamedTuple):
    """What a step yields; its tensors are good until the next step of as many rows and tokens."""

    hidden: Float[Tensor, "sequence step d_model"]
    """The residual stream after the final norm."""
    logits: Float[Tensor, "sequence step vocab"]
    layout: SequenceLayout
    """For `HybridCache.accept` after a tentative step."""


class _Shape(NamedTuple):
    rows: int
    length: int
    is_tentative: bool


class StepRunner:
    """Runs the steps of one model on one cache."""

    def __init__(self, model: SteppingModel, cache: HybridCache) -> None:
        self.model, self.cache = model, cache
        self._recordings = Recordings(cache)

    def run(
        self, tokens: Sequence[Sequence[int]], slots: Sequence[int], *, is_tentative: bool = False
    ) -> StepOutput:
        """Feed each slot its tokens, the same number (at most `MAX_STEPS`) for all.

        The cache takes the pages it needs; where it has none left, no slot has gone on. Gradients
        have to be off: in inference mode, if the cache is used in that, else by no_grad.
        """
        assert not torch.is_grad_enabled(), "steps have no gradients"
        rows, length = len(tokens), len(tokens[0]) if tokens else 0
        if any(len(part) != length for part in tokens) or not 0 < length <= MAX_STEPS:
            raise ConfigError(
                f"a step brings sequences of {[len(part) for part in tokens]} tokens; it takes as "
                f"many from each, from 1 to {MAX_STEPS}: call the model for anything else"
            )
        layout = self.cache.layout([length] * rows, slots, is_tentative=is_tentative)
        inputs = torch.tensor(
            [*(token for part in tokens for token in part), *layout.slots, *layout.context]
        )
        shape = _Shape(rows, length, is_tentative)

        def forward(inputs: Tensor) -> tuple[Tensor, Tensor]:
            return self._forward(shape, layout, inputs)

        if not self._recordings.are_possible:
            hidden, logits = forward(inputs.to(self.cache.device))
        elif self._recordings.find(shape):
            self.cache.check(layout)
            hidden, logits = self._recordings.run(shape, (inputs,), forward)
            self.cache.advance(layout)
        else:
            hidden, logits = self._recordings.run(shape, (inputs,), forward)
        parts = (rows, length)
        return StepOutput(hidden.unflatten(0, parts), logits.unflatten(0, parts), layout)

    def forget(self) -> None:
        """Record anew: the model's parameters are other tensors."""
        self._recordings.forget()

    def _forward(
        self, shape: _Shape, layout: SequenceLayout, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = shape.rows
        tokens, *places = inputs.split([rows * shape.length, rows, rows])
        layout = SequenceLayout(
            layout.segments,
            context=layout.context,
            slots=layout.slots,
            is_tentative=layout.is_tentative,
            places=Places(*places),
        )
        hidden = self.model.hidden_states(tokens, layout=layout, state=self.cache)
        return hidden, self.model.logits(hidden)
