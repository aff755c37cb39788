"""The model runner: all calls of the model that an engine makes.

    runner = ModelRunner(model, cache)
    hidden = runner.prefill([prompt], [3])                    # packed, of any lengths
    out = runner.decode([[token_of_3], [token_of_0]], [3, 0])
    out.logits[:, -1].argmax(-1)                              # next tokens of slots 3 and 0

A decoding step has a few new tokens, the same number for each sequence. The first step of a shape
runs the model's forward pass. If the device can record it, later steps of that shape replay its
graph (graph_cache.py) with other tokens, slots and lengths. On a CPU a short chunk of a prompt,
such as the tokens after a chat's last message, is recorded as well, because Python would take most
of its time. On a GPU it is not: prompts have too many shapes to capture.

Where batches are padded, decoding steps have few sizes, each at most an eighth larger than the
number of sequences. Padding has slot -1, which kernels ignore. On a CPU a step of a size that does
not last is made of two smaller ones: as the last answers of a large batch end, every step has
another size, and recording each would take longer than the steps.
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

_PART = 16
"""Sizes of decoding steps up to this one have a graph each; larger ones that do not last are a
multiple of it, and the rest."""
_LASTING = 16
"""Steps of the same size after which it is recorded as a whole."""


class StepOutput(NamedTuple):
    """Outputs of a decoding step; its tensors are valid until the next call of the model."""

    hidden: Float[Tensor, "sequence step d_model"]
    """The residual stream after the final norm."""
    logits: Float[Tensor, "sequence step vocab"]
    layout: SequenceLayout
    """The argument of `HybridCache.accept` after a verification step."""
    routes: tuple[Int[Tensor, "sequence step choice"], ...] = ()
    """The experts of each MoE layer, first to last; empty unless the runner returns them."""


class _Shape(NamedTuple):
    rows: int
    length: int
    is_verification: bool


class PrefillOutput(NamedTuple):
    """Outputs of a prefill; its tensors are valid until the next call of the model."""

    hidden: Float[Tensor, "tokens d_model"]
    routes: tuple[Int[Tensor, "tokens choice"], ...] = ()
    """The experts of each MoE layer, first to last; empty unless the runner returns them."""


class ModelRunner:
    """Executes one model on one carried state.

    With `returns_routes` prefills and decoding steps return the experts that the routers chose.
    `make_pool` returns the pool for captured graphs, or None if the device cannot capture.
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
        # Graphs of one pool overwrite each other's results, and the draft block runs while those of
        # a decoding step are still needed.
        self._graphs = GraphCache(cache, make_pool(cache.device))
        self._draft_graphs = GraphCache(cache, make_pool(cache.device))
        self._seen: set[tuple[int, int]] = set()
        """Rows and length of short prefills that were called once without a graph."""
        self._last_shape: _Shape | None = None
        self._num_alike = 0  # steps of that shape, one after another

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        *,
        is_prompt: bool = True,
        output_indices: Sequence[int] | None = None,
    ) -> PrefillOutput:
        """Prefill prompts or chunks of them; returns packed hidden states, or those at
        `output_indices`.

        With `is_prompt=False` the tokens are those of an answer whose state is recomputed: narrow
        states are then rounded after each token, as when the answer was generated.
        """
        layout = self.cache.layout([len(part) for part in tokens], slots, is_prompt=is_prompt)
        device = self.model.device
        at = (
            None
            if output_indices is None
            else torch.tensor(output_indices, dtype=torch.int64, device=device)
        )
        if self.cache.takes_steps(layout) and self._records_prefill(layout):
            out = self._prefill_step(tokens, layout)
            return out if at is None else PrefillOutput(out.hidden[at])
        return PrefillOutput(*self._forward(self._embed(tokens), layout, output_indices=at))

    def _records_prefill(self, layout: SequenceLayout) -> bool:
        """Whether a short prefill is called by a graph: from the second call of its shape on.

        Batches of short chunks have many shapes, and to record one takes as long as some calls.
        """
        if not self._graphs.is_supported or self._graphs.pads_batch:
            return False
        rows, length = len(layout.segments), layout.segments.max_length
        if self._graphs.has(("prefill", rows, length)):
            return True
        has_come = (rows, length) in self._seen
        (self._seen.discard if has_come else self._seen.add)((rows, length))
        return has_come

    def decode(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        *,
        is_verification: bool = False,
    ) -> StepOutput:
        """Continue each slot by its tokens, the same number (at most `MAX_STEPS`) for all.

        The cache allocates the pages that it needs; if it has none left, it raises and no slot has
        changed. Gradients must be disabled: by inference mode if the cache was made in it, else by
        `no_grad`.
        """
        assert not torch.is_grad_enabled(), "steps have no gradients"
        rows, lengths = len(tokens), {len(part) for part in tokens}
        if len(lengths) != 1 or not 0 < (length := lengths.pop()) <= MAX_STEPS:
            raise ConfigError(
                f"a decoding step has sequences of {[len(part) for part in tokens]} new tokens; "
                f"give the same number for each, from 1 to {MAX_STEPS}, or call prefill"
            )
        layout = self.cache.layout([length] * rows, slots, is_verification=is_verification)
        self.cache.check(layout)
        padded = padded_rows(rows) if self._graphs.pads_batch else rows
        shape = _Shape(padded, length, is_verification)
        packed = _packed(tokens)
        if self._splits(shape):
            most = rows // _PART * _PART
            parts = [
                self._run_decode(
                    _Shape(stop - start, length, is_verification),
                    packed[start * length : stop * length],
                    layout.slots[start:stop],
                    layout.cached_lengths[start:stop],
                )
                for start, stop in ((0, most), (most, rows))
            ]
            outputs = tuple(torch.cat(both) for both in zip(*parts, strict=True))
        else:
            outputs = self._run_decode(shape, packed, layout.slots, layout.cached_lengths)
        self.cache.advance(layout)
        if padded > rows:
            outputs = tuple(output[:rows] for output in outputs)
        hidden, logits, *routes = outputs
        return StepOutput(hidden, logits, layout, tuple(routes))

    def _splits(self, shape: _Shape) -> bool:
        """Whether a step is made of two, because its size has no graph and may not last."""
        self._num_alike = self._num_alike + 1 if shape == self._last_shape else 1
        self._last_shape = shape
        return (
            self._graphs.is_supported
            and not self._graphs.pads_batch
            and not shape.is_verification  # its states are accepted for all sequences at once
            and shape.rows > _PART
            and shape.rows % _PART != 0
            and self._num_alike < _LASTING
            and not self._graphs.has(shape)
        )

    def _run_decode(
        self,
        shape: _Shape,
        tokens: list[int],
        slots: Sequence[int],
        cached_lengths: Sequence[int],
    ) -> tuple[Tensor, ...]:
        inputs = _decode_inputs(shape, tokens, slots, cached_lengths)
        step = self._decode_step(shape)
        if not self._graphs.is_supported:
            return step(inputs.to(self.cache.device))
        return self._graphs.run(
            shape,
            (inputs,),
            step,
            padding_inputs=lambda: (_decode_inputs(shape, [], (), ()),),
        )

    def read_drafts(
        self,
        tokens: Sequence[Sequence[int]],
        hidden: Float[Tensor, "tokens d_model"],
        slots: Sequence[int],
        cached_lengths: Sequence[int],
    ) -> None:
        """Prefill parts of prompts in the draft block, after `cached_lengths` tokens of each."""
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

        They are valid until its next step.
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
        """Drop all graphs, because the model's parameters are other tensors."""
        self._graphs.clear()
        self._draft_graphs.clear()

    def _prefill_step(
        self, tokens: Sequence[Sequence[int]], layout: SequenceLayout
    ) -> PrefillOutput:
        """Prefill chunks of equal, small size by a recorded graph."""
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
        """The forward pass of a decoding step; its input is tokens, slots and cached lengths."""
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
        """Hidden states, and the experts if the runner returns them."""
        out = self.model.backbone(x, layout, self.cache, output_indices=output_indices)
        routes = [r.indices for r in out.routings] if self._returns_routes else []
        return out.hidden, tuple(routes)

    def _embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        return self.model.embed(torch.tensor(_packed(tokens), device=self.model.device))


def padded_rows(rows: int) -> int:
    """`rows` rounded up, by at most an eighth: to a multiple of a power of two."""
    grain = 1 << max(rows.bit_length() - 4, 0)
    return -(-rows // grain) * grain


def _packed(tokens: Sequence[Sequence[int]]) -> list[int]:
    return [token for part in tokens for token in part]


def _split(numbers: Tensor, *sizes: int) -> list[Tensor]:
    """Consecutive parts of a tensor, as views."""
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
    """The layout of a step whose slots and lengths are tensors, so that a graph can be replayed."""
    return SequenceLayout(
        Segments.uniform(rows, length),
        is_verification=is_verification,
        device_layout=DeviceLayout(slots, cached_lengths),
    )


def _decode_inputs(
    shape: _Shape, tokens: list[int], slots: Sequence[int], cached_lengths: Sequence[int]
) -> Tensor:
    """Tokens, slots and cached lengths, padded up to the rows of the shape."""
    if missing := shape.rows - len(slots):
        tokens = [*tokens, *[0] * (missing * shape.length)]
        slots, cached_lengths = (*slots, *[-1] * missing), (*cached_lengths, *[0] * missing)
    return torch.tensor([*tokens, *slots, *cached_lengths])
