"""Decoding steps: a few new tokens of each of some sequences, again and again.

Whoever decodes calls `StepRunner.run` and need not know how the step is carried out.

    steps = StepRunner(model, cache)
    out = steps.run([[token_of_3], [token_of_0]], [3, 0])
    out.logits[:, -1].argmax(-1)                              # next tokens of slots 3 and 0

The first step of each shape is the model's forward pass; where that can be recorded, those after it
replay its graph (graph_cache.py) on new tokens, slots and lengths.

Where batches are padded, steps come in few sizes, each at most an eighth larger than the rows it is
for. The rows that are too many have slot -1, which kernels leave alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.graph_cache import GraphCache
from nemotron3.models.hybrid_cache import HybridCache
from nemotron3.models.layout import MAX_STEPS, DeviceLayout, SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments


class StepOutput(NamedTuple):
    """What a step yields; its tensors are good until the next step."""

    hidden: Float[Tensor, "sequence step d_model"]
    """The residual stream after the final norm."""
    logits: Float[Tensor, "sequence step vocab"]
    layout: SequenceLayout
    """For `HybridCache.accept` after a verification step."""
    routes: tuple[Int[Tensor, "sequence step choice"], ...] = ()
    """The experts that each mixture chose, first to last, where they are returned."""


class _Shape(NamedTuple):
    rows: int
    length: int
    is_verification: bool


class StepRunner:
    """Runs the steps of one model on one cache."""

    def __init__(
        self, model: LanguageModel, cache: HybridCache, *, returns_routes: bool = False
    ) -> None:
        self.model, self.cache = model, cache
        self._returns_routes = returns_routes
        self._graphs = GraphCache(cache)

    def run(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        *,
        is_verification: bool = False,
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
        layout = self.cache.layout([length] * rows, slots, is_verification=is_verification)
        self.cache.check(layout)
        padded = _padded(rows) if self._graphs.pads_batch else rows
        shape = _Shape(padded, length, is_verification)
        inputs = _inputs(shape, [token for part in tokens for token in part], layout)
        step = self._step(shape)
        if self._graphs.is_supported:
            outputs = self._graphs.run(
                shape, (inputs,), step, padding_inputs=lambda: (_inputs(shape, [], None),)
            )
        else:
            outputs = step(inputs.to(self.cache.device))
        self.cache.advance(layout)
        if padded > rows:
            outputs = tuple(output[:rows] for output in outputs)
        hidden, logits, *routes = outputs
        return StepOutput(hidden, logits, layout, tuple(routes))

    def clear_graphs(self) -> None:
        """Record anew: the model's parameters are other tensors."""
        self._graphs.clear()

    def _step(self, shape: _Shape) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The forward pass of such a step, on tokens, then slots, then lengths of the context."""
        rows, length, is_verification = shape

        def step(inputs: Tensor) -> tuple[Tensor, ...]:
            tokens, *device_layout = inputs.split([rows * length, rows, rows])
            layout = SequenceLayout(
                Segments.uniform(rows, length),
                is_verification=is_verification,
                device_layout=DeviceLayout(*device_layout),
            )
            out = self.model.backbone(self.model.embed(tokens), layout, self.cache)
            logits = self.model.logits(out.hidden)
            routes = [r.indices for r in out.routings] if self._returns_routes else []
            return tuple(y.view(rows, length, -1) for y in (out.hidden, logits, *routes))

        return step


def _padded(rows: int) -> int:
    """As many rows or a few more: a multiple of the largest power of two that is an eighth."""
    grain = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // grain) * grain


def _inputs(shape: _Shape, tokens: list[int], layout: SequenceLayout | None) -> Tensor:
    """Tokens, slots and lengths of the context; padding where the layout has no more sequences."""
    slots, cached_lengths = ((), ()) if layout is None else (layout.slots, layout.cached_lengths)
    if missing := shape.rows - len(slots):
        tokens = [*tokens, *[0] * (missing * shape.length)]
        slots, cached_lengths = (*slots, *[-1] * missing), (*cached_lengths, *[0] * missing)
    return torch.tensor([*tokens, *slots, *cached_lengths])
