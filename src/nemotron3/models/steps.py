"""Decoding steps: a few new tokens of each of some sequences, again and again.

Whoever decodes calls `StepRunner.run` and need not know how the step is carried out.

    steps = StepRunner(model, cache)
    out = steps.run([[token_of_3], [token_of_0]], [3, 0])
    out.logits[:, -1].argmax(-1)                              # next tokens of slots 3 and 0

The first step of each shape is the model's forward pass; where that can be recorded, those after it
are its recording (recordings.py), played on new tokens, slots and lengths.

Where padding is taken, steps come in few sizes, each at most an eighth larger than the rows it is
for. The rows that are too many have slot -1, which kernels leave alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.cache import HybridCache
from nemotron3.models.layout import MAX_STEPS, Places, SequenceLayout
from nemotron3.models.recordings import Recordings
from nemotron3.ops.segments import Segments


class SteppingModel(Protocol):
    """What a step asks of a model."""

    def hidden_states(
        self, tokens: Tensor, *, layout: SequenceLayout, state: HybridCache
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class StepOutput(NamedTuple):
    """What a step yields; its tensors are good until the next step."""

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
        rows, lengths = len(tokens), {len(part) for part in tokens}
        if len(lengths) != 1 or not 0 < (length := lengths.pop()) <= MAX_STEPS:
            raise ConfigError(
                f"a step brings sequences of {[len(part) for part in tokens]} tokens; it takes as "
                f"many from each, from 1 to {MAX_STEPS}: call the model for anything else"
            )
        layout = self.cache.layout([length] * rows, slots, is_tentative=is_tentative)
        self.cache.check(layout)
        padded = _padded(rows) if self._recordings.take_padding else rows
        shape = _Shape(padded, length, is_tentative)
        inputs = _inputs(shape, [token for part in tokens for token in part], layout)
        step = self._step(shape)
        if self._recordings.are_possible:
            hidden, logits = self._recordings.run(
                shape, (inputs,), step, idle=lambda: (_inputs(shape, [], None),)
            )
        else:
            hidden, logits = step(inputs.to(self.cache.device))
        self.cache.advance(layout)
        if padded > rows:
            hidden, logits = hidden[:rows], logits[:rows]
        return StepOutput(hidden, logits, layout)

    def forget(self) -> None:
        """Record anew: the model's parameters are other tensors."""
        self._recordings.forget()

    def _step(self, shape: _Shape) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The forward pass of such a step, on tokens, then slots, then lengths of the context."""
        rows, length, is_tentative = shape

        def step(inputs: Tensor) -> tuple[Tensor, Tensor]:
            tokens, *places = inputs.split([rows * length, rows, rows])
            layout = SequenceLayout(
                Segments.uniform(rows, length), is_tentative=is_tentative, places=Places(*places)
            )
            hidden = self.model.hidden_states(tokens, layout=layout, state=self.cache)
            logits = self.model.logits(hidden)
            return hidden.view(rows, length, -1), logits.view(rows, length, -1)

        return step


def _padded(rows: int) -> int:
    """As many rows or a few more: a multiple of the largest power of two that is an eighth."""
    grain = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // grain) * grain


def _inputs(shape: _Shape, tokens: list[int], layout: SequenceLayout | None) -> Tensor:
    """Tokens, slots and lengths of the context; padding where the layout has no more sequences."""
    slots, context = ((), ()) if layout is None else (layout.slots, layout.context)
    if missing := shape.rows - len(slots):
        tokens = [*tokens, *[0] * (missing * shape.length)]
        slots, context = (*slots, *[-1] * missing), (*context, *[0] * missing)
    return torch.tensor([*tokens, *slots, *context])
