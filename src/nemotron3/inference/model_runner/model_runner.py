"""Every call of the model that an engine makes: prompts, decoding steps, the draft block.

    runner = ModelRunner(model, cache)
    hidden = runner.prefill([prompt], [3])                    # packed, whatever the lengths
    out = runner.decode([[token_of_3], [token_of_0]], [3, 0])
    out.logits[:, -1].argmax(-1)                              # next tokens of slots 3 and 0

A step takes a few new tokens, the same number from each of some sequences. The first one of each
shape is the model's forward pass; where that can be recorded, those after it replay its graph
(graph_cache.py) on new tokens, slots and lengths. Chunks of prompts that are no longer than a step
are steps as well: what stands behind a chat's last message is, and most of its time would be
Python. Not so on a GPU, where prompts are of too many shapes to capture each.

Where batches are padded, decoding steps come in few sizes, each at most an eighth larger than the
rows it is for. The rows that are too many have slot -1, which kernels leave alone.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.inference.model_runner.graph_cache import GraphCache, GraphPool
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.layout import MAX_STEPS, DeviceLayout, SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments
from nemotron3.runtime.cuda_graph import cuda_graph_pool


class StepOutput(NamedTuple):
    """What a decoding step yields; its tensors are good until the next call of the model."""

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


class PrefillOutput(NamedTuple):
    """What reading prompts yields; its tensors are good until the next call of the model."""

    hidden: Float[Tensor, "tokens d_model"]
    routes: tuple[Int[Tensor, "tokens choice"], ...] = ()
    """The experts that each mixture chose, first to last, where they are returned."""


class ModelRunner:
    """Runs one model on one carried state.

    With `returns_routes` prompts and decoding steps return the experts that they chose.
    `make_pool` gives the pool that graphs are captured in, or None where a device captures none.
    """

    def __init__(
        self,
        model: LanguageModel,
        cache: HybridCache,
        *,
        returns_routes: bool = False,
        make_pool: Callable[[torch.device], GraphPool | None] = cuda_graph_pool,
    ) -> None:
        self.model = model
        self.cache = cache
        self._returns_routes = returns_routes
        # Graphs of one pool write over each other's results, and those of a decoding step are
        # still read while the draft block runs.
        self._graphs = GraphCache(cache, make_pool(cache.device))
        self._draft_graphs = GraphCache(cache, make_pool(cache.device))

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        *,
        is_prompt: bool = True,
        output_indices: Sequence[int] | None = None,
    ) -> PrefillOutput:
        """Read prompts, or chunks of them; returns their hidden states, packed, or those at
        `output_indices`.

        What is no prompt was written here before, and is read as it was then: as steps.
        """
        layout = self.cache.layout([len(part) for part in tokens], slots, is_prompt=is_prompt)
        device = self.model.device
        at = (
            None
            if output_indices is None
            else torch.tensor(output_indices, dtype=torch.int64, device=device)
        )
        records = self._graphs.is_supported and not self._graphs.pads_batch
        if records and self.cache.takes_steps(layout):
            out = self._prefill_step(tokens, layout)
            return out if at is None else PrefillOutput(out.hidden[at])
        return PrefillOutput(*self._forward(self._embed(tokens), layout, output_indices=at))

    def decode(
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
        padded = padded_rows(rows) if self._graphs.pads_batch else rows
        shape = _Shape(padded, length, is_verification)
        inputs = _decode_inputs(shape, _packed(tokens), layout)
        step = self._decode_step(shape)
        if self._graphs.is_supported:
            outputs = self._graphs.run(
                shape, (inputs,), step, padding_inputs=lambda: (_decode_inputs(shape, [], None),)
            )
        else:
            outputs = step(inputs.to(self.cache.device))
        self.cache.advance(layout)
        if padded > rows:
            outputs = tuple(output[:rows] for output in outputs)
        hidden, logits, *routes = outputs
        return StepOutput(hidden, logits, layout, tuple(routes))

    def read_drafts(
        self,
        tokens: Sequence[Sequence[int]],
        hidden: Float[Tensor, "tokens d_model"],
        slots: Sequence[int],
        cached_lengths: Sequence[int],
    ) -> None:
        """Have the draft block read parts of prompts, behind `cached_lengths` tokens of theirs."""
        mtp = self.model.mtp
        assert mtp is not None
        layout = SequenceLayout(
            Segments([len(part) for part in tokens]),
            cached_lengths=tuple(cached_lengths),
            slots=tuple(slots),
        )
        mtp.read(self._embed(tokens), hidden, layout, self.cache.draft_layers)

    def draft(
        self,
        tokens: Sequence[Sequence[int]],
        hidden: Float[Tensor, "tokens d_model"],
        slots: Sequence[int],
        cached_lengths: Sequence[int],
        last: Sequence[int],
    ) -> tuple[Float[Tensor, "sequences d_model"], Float[Tensor, "sequences vocab"]]:
        """A step of the draft block: its output and logits at token `last[i]` of sequence i.

        They are good until the next one.
        """
        mtp, rows, steps = self.model.mtp, len(tokens), len(tokens[0])
        assert mtp is not None

        def step(numbers: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
            ids, at, slots_, lengths_ = _split(numbers, rows * steps, rows, rows, rows)
            layout = _step_layout(rows, steps, slots_, lengths_)
            x, states = self.model.embed(ids), self.cache.draft_layers
            picked, _ = mtp(x, hidden, layout, states, output_indices=at)
            return picked, self.model.logits(picked)

        where = [row * steps + place for row, place in enumerate(last)]
        numbers = torch.tensor([*_packed(tokens), *where, *slots, *cached_lengths])
        numbers = numbers.to(self.model.device)
        if not self._draft_graphs.is_supported:
            return step(numbers, hidden)

        def padding_inputs() -> tuple[Tensor, Tensor]:
            padding = torch.zeros_like(numbers)
            padding[-2 * rows : -rows] = -1  # no slots
            return padding, torch.zeros_like(hidden)

        picked, logits = self._draft_graphs.run(
            (rows, steps), (numbers, hidden), step, padding_inputs=padding_inputs
        )
        return picked, logits

    def clear_graphs(self) -> None:
        """Record anew: the model's parameters are other tensors."""
        self._graphs.clear()
        self._draft_graphs.clear()

    def _prefill_step(
        self, tokens: Sequence[Sequence[int]], layout: SequenceLayout
    ) -> PrefillOutput:
        """Read chunks of a step's size."""
        rows, length = len(tokens), layout.segments.max_length

        def step(numbers: Tensor) -> tuple[Tensor, ...]:
            ids, slots, cached_lengths = _split(numbers, rows * length, rows, rows)
            played = _step_layout(rows, length, slots, cached_lengths)
            hidden, routes = self._forward(self.model.embed(ids), played)
            return hidden, *routes

        self.cache.check(layout)
        numbers = torch.tensor([*_packed(tokens), *layout.slots, *layout.cached_lengths])
        hidden, *routes = self._graphs.run(("prefill", rows, length), (numbers,), step)
        self.cache.advance(layout)
        return PrefillOutput(hidden, tuple(routes))

    def _decode_step(self, shape: _Shape) -> Callable[[Tensor], tuple[Tensor, ...]]:
        """The forward pass of such a step, on tokens, then slots, then lengths of the context."""
        rows, length, is_verification = shape

        def step(inputs: Tensor) -> tuple[Tensor, ...]:
            tokens, slots, cached_lengths = _split(inputs, rows * length, rows, rows)
            layout = _step_layout(
                rows, length, slots, cached_lengths, is_verification=is_verification
            )
            hidden, routes = self._forward(self.model.embed(tokens), layout)
            outputs = (hidden, self.model.logits(hidden), *routes)
            return tuple(output.view(rows, length, -1) for output in outputs)

        return step

    def _forward(
        self, x: Tensor, layout: SequenceLayout, *, output_indices: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states, and the experts that were chosen where they are returned."""
        out = self.model.backbone(x, layout, self.cache, output_indices=output_indices)
        routes = [r.indices for r in out.routings] if self._returns_routes else []
        return out.hidden, tuple(routes)

    def _embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return self.model.embed(torch.tensor(_packed(tokens), device=self.model.device))


def padded_rows(rows: int) -> int:
    """As many rows or a few more: a multiple of the largest power of two that is an eighth."""
    grain = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // grain) * grain


def _packed(tokens: Sequence[Sequence[int]]) -> list[int]:
    return [token for part in tokens for token in part]


def _split(numbers: Tensor, *sizes: int) -> list[Tensor]:
    """Views of a row of numbers that holds several things one after another."""
    ends = list(accumulate(sizes))
    return [numbers[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _step_layout(
    rows: int,
    length: int,
    slots: Tensor,
    cached_lengths: Tensor,
    *,
    is_verification: bool = False,
) -> SequenceLayout:
    """The layout of a step, with what differs from one to the next in tensors."""
    return SequenceLayout(
        Segments.uniform(rows, length),
        is_verification=is_verification,
        device_layout=DeviceLayout(slots, cached_lengths),
    )


def _decode_inputs(shape: _Shape, tokens: list[int], layout: SequenceLayout | None) -> Tensor:
    """Tokens, slots and lengths of the context; padding where the layout has no more sequences."""
    slots, cached_lengths = ((), ()) if layout is None else (layout.slots, layout.cached_lengths)
    if missing := shape.rows - len(slots):
        tokens = [*tokens, *[0] * (missing * shape.length)]
        slots, cached_lengths = (*slots, *[-1] * missing), (*cached_lengths, *[0] * missing)
    return torch.tensor([*tokens, *slots, *cached_lengths])
