"""What an engine runs beside decoding steps: prompts, packed, and the draft block.

Decoding steps are `models/steps.py`'s. Those of the draft block are recorded and played as well,
and so are chunks of prompts that are no longer than a step: what stands behind a chat's last
message is, and most of its time would be Python.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.models.graph_cache import GraphCache
from nemotron3.models.hybrid_cache import HybridCache
from nemotron3.models.layout import DeviceLayout, SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.segments import Segments


class PassOutput(NamedTuple):
    """What reading prompts yields; its tensors are good until the next pass."""

    hidden: Float[Tensor, "tokens d_model"]
    routes: tuple[Int[Tensor, "tokens choice"], ...] = ()
    """The experts that each mixture chose, first to last, where they are returned."""


class ModelRunner:
    """Runs one model on one carried state, decoding steps apart."""

    def __init__(
        self, model: LanguageModel, cache: HybridCache, *, returns_routes: bool = False
    ) -> None:
        self.model = model
        self.cache = cache
        self._returns_routes = returns_routes
        self._graphs = GraphCache(cache)
        # On a GPU prompts are of too many shapes to capture each.
        self._plays_steps = self._graphs.is_supported and not self._graphs.pads_batch

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        slots: Sequence[int],
        *,
        is_prompt: bool = True,
        output_indices: Sequence[int] | None = None,
    ) -> PassOutput:
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
        if self._plays_steps and self.cache.takes_steps(layout):
            out = self._read_step(tokens, layout)
            return out if at is None else PassOutput(out.hidden[at])
        return PassOutput(*self._read(self._embed(tokens), layout, output_indices=at))

    def _read(
        self, x: Tensor, layout: SequenceLayout, *, output_indices: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = self.model.backbone(x, layout, self.cache, output_indices=output_indices)
        routes = [r.indices for r in out.routings] if self._returns_routes else []
        return out.hidden, tuple(routes)

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
            ids, (at, slots_, cached_lengths_) = (
                numbers[: -3 * rows],
                numbers[-3 * rows :].view(3, rows),
            )
            device_layout = DeviceLayout(slots_, cached_lengths_)
            layout = SequenceLayout(Segments.uniform(rows, steps), device_layout=device_layout)
            x, states = self.model.embed(ids), self.cache.draft_layers
            picked, _ = mtp(x, hidden, layout, states, output_indices=at)
            return picked, self.model.logits(picked)

        where = [row * steps + place for row, place in enumerate(last)]
        numbers = torch.tensor(
            [*(t for part in tokens for t in part), *where, *slots, *cached_lengths]
        )
        numbers = numbers.to(self.model.device)
        if not self._graphs.is_supported:
            return step(numbers, hidden)

        def padding_inputs() -> tuple[Tensor, Tensor]:
            padding = torch.zeros_like(numbers)
            padding[-2 * rows : -rows] = -1  # no slots
            return padding, torch.zeros_like(hidden)

        picked, logits = self._graphs.run(
            (rows, steps), (numbers, hidden), step, padding_inputs=padding_inputs
        )
        return picked, logits

    def clear_graphs(self) -> None:
        """Record the draft block's steps anew: the model's parameters are other tensors."""
        self._graphs.clear()

    def _read_step(self, tokens: Sequence[Sequence[int]], layout: SequenceLayout) -> PassOutput:
        """Read chunks of a step's size."""
        rows, segments = len(tokens), layout.segments

        def step(numbers: Tensor) -> tuple[Tensor, ...]:
            ids, (slots, cached_lengths) = numbers[: -2 * rows], numbers[-2 * rows :].view(2, rows)
            played = SequenceLayout(segments, device_layout=DeviceLayout(slots, cached_lengths))
            hidden, routes = self._read(self.model.embed(ids), played)
            return hidden, *routes

        self.cache.check(layout)
        stream = [token for part in tokens for token in part]
        numbers = torch.tensor([*stream, *layout.slots, *layout.cached_lengths])
        shape = ("prompt", rows, segments.max_length)
        hidden, *routes = self._graphs.run(shape, (numbers,), step)
        self.cache.advance(layout)
        return PassOutput(hidden, tuple(routes))

    def _embed(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        stream = [token for part in tokens for token in part]
        return self.model.embed(torch.tensor(stream, device=self.model.device))
