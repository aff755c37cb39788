"""The `HybridCache`: the carried state of a whole model, and the methods that change it.

One `HybridCache` serves a number of sequences, each in a slot of its own. The layout of a call says
which slots its sequences use and how many tokens these contain. Each layer reads and writes its own
state, and the model advances the lengths after the call.

    cache = model.new_state(slots=2)
    model(prompt, layout=cache.layout([7, 3]), state=cache)   # two prompts, packed
    model(tokens, layout=cache.layout([1, 1]), state=cache)   # one more token each

Four methods manage sequences, whatever the layers store: `snapshot` copies the state of a slot,
`restore` puts it into a slot, `fork` copies one slot to another, `free` empties a slot. Prefix
caching, several answers to one prompt and preemption use these alone. For drafts, a verification
call leaves the slots unchanged until `accept` says how many of its tokens are accepted.

Keys and values are in pages that are shared, so a snapshot takes little more memory than the states
of fixed size: some megabytes, for a sequence of any length. The cache knows no kinds of layers;
each layer defines its state as a `LayerState`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemotron3.errors import ConfigError
from nemotron3.models.cache.draft_state import DraftSnapshot, DraftState
from nemotron3.models.cache.pages import PagePool, PageTable
from nemotron3.models.cache.state import (
    CachedModelConfig,
    LayerState,
    Parts,
    StatefulLayerConfig,
    StateMemory,
)
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.layout import SequenceLayout
from nemotron3.ops.gather import copy_rows
from nemotron3.ops.segments import Segments

_NOWHERE = 0, 0

PAGE_SIZE = 64
"""Tokens of a page: long contiguous reads for kernels, and little waste in the last page."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a slot at one moment; `HybridCache.drop` releases its pages."""

    length: int
    pages: tuple[int, ...]
    states: tuple[Parts, ...]
    """Rows of each layer that has any, in the order of layers."""
    drafts: DraftSnapshot | None
    """The state of the MTP block, if the cache was made with drafts."""

    @property
    def nbytes(self) -> int:
        """Its own memory, without the pages that it shares."""
        drafts = 0 if self.drafts is None else self.drafts.nbytes
        return drafts + sum(part.nbytes for state in self.states for part in state)


class HybridCache:
    """States of all layers for a number of slots.

    States have no gradients: they are constants for later calls. With `pages` the memory of keys
    and values is fixed, and `layout` raises OverloadedError when no page is free; without, it
    grows. `max_length` fixes the width of the page table in the same way.
    """

    def __init__(  # noqa: PLR0913
        self,
        config: CachedModelConfig,
        *,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE_SIZE,
        pages: int | None = None,
        max_length: int = 0,
        drafts: bool = False,
        precision: StatePrecision | None = None,
    ) -> None:
        precision = precision or StatePrecision()
        self.dtype, self.device = dtype, device
        self.keys_dtype = precision.keys_dtype(dtype)
        self.lengths = [0] * slots
        self.pool = PagePool(pages)
        self.table = PageTable(slots, page_size, -(-max_length // page_size), device)
        main, draft = config.layers, config.mtp_layers if drafts else ()
        scales = _key_scales(precision, (*main, *draft))
        states = [
            _new_state(
                mixer,
                StateMemory(
                    slots=slots, pages=pages or 0, table=self.table, dtype=dtype, device=device,
                    precision=precision, layer=layer, key_scales=scales[layer],
                ),
            )
            for layer, mixer in enumerate((*main, *draft))
        ]  # fmt: skip
        self.layers, self.draft_layers = states[: len(main)], states[len(main) :]
        self.drafts = (
            DraftState(slots, config.hidden_size, dtype=dtype, device=device) if drafts else None
        )
        """The progress of the multi-token-prediction block, if it drafts."""
        self._writable: list[tuple[int, int]] = [_NOWHERE] * slots
        """First and end of each slot's positions that are known to be in pages of its own: most
        calls look here."""
        self._with_rows = [layer for layer in self.layers if layer is not None and layer.rows]
        self._with_pages = [layer for layer in states if layer is not None and layer.pages]
        if any(layer is not None and layer.rows for layer in self.draft_layers):
            raise ConfigError(
                "the multi-token-prediction block has layers with a state of each sequence, which "
                "rejected drafts would change; make the cache without drafts"
            )

    @property
    def state_nbytes(self) -> int:
        """Memory of the states of fixed size, without keys and values."""
        return sum(rows.nbytes for layer in self._with_rows for rows in layer.rows)

    def addresses(self) -> tuple[int, ...]:
        """Addresses of the tensors that may grow: they change when one is replaced by a larger one.

        Intermediate states of all layers grow in the same calls, and so do pages, so those of the
        first layer represent all.
        """
        tensors = [self.table.tensor]
        for layer in self._with_rows[:1]:
            tensors += layer.intermediate_states
        for layer in self._with_pages[:1]:
            tensors += layer.pages
        return tuple([tensor.data_ptr() for tensor in tensors])

    def layout(
        self,
        lengths: Sequence[int],
        slots: Sequence[int] | None = None,
        *,
        is_verification: bool = False,
        is_prompt: bool = False,
    ) -> SequenceLayout:
        """The layout of a call with `lengths` new tokens for `slots` (by default, all).

        It reserves the pages that the call will fill; raises OverloadedError if too few are free.
        """
        slots = tuple(range(len(self.lengths))) if slots is None else tuple(slots)
        cached_lengths = tuple(self.lengths[s] for s in slots)
        if len(set(slots)) == len(slots):
            for slot, new in zip(slots, lengths, strict=True):
                self.reserve(slot, new)
        return SequenceLayout(
            Segments(lengths),
            cached_lengths=cached_lengths,
            slots=slots,
            is_verification=is_verification,
            is_prompt=is_prompt,
        )

    def missing_pages(self, slot: int, new_tokens: int) -> int:
        """Number of pages that a slot needs for `new_tokens` more tokens."""
        first, stop = self._writable[slot]
        end = self.lengths[slot] + new_tokens
        if (end <= stop and first <= self._first_written(slot)) or not self._with_pages:
            return 0
        more = self.table.pages_for(end) - len(self.table.rows[slot])
        missing = max(more, 0) + len(self._shared_places(slot))
        if not missing:
            size = self.table.page_size
            first = self._first_written(slot) // size * size
            self._writable[slot] = first, len(self.table.rows[slot]) * size
        return missing

    def reserve(self, slot: int, new_tokens: int) -> None:
        """Allocate the pages for `new_tokens` more tokens of a slot, all or none."""
        missing = self.missing_pages(slot, new_tokens)
        if missing <= 0:
            return
        taken = self.pool.take(missing)
        for layer in self._with_pages:
            layer.grow(len(self.pool))
        for place in self._shared_places(slot):
            shared, copy = self.table.rows[slot][place], taken.pop()
            for layer in self._with_pages:
                layer.copy_page(shared, copy)
            self.table.replace(slot, place, copy)
            self.pool.release([shared])
        self.table.extend(slot, taken)

    def check(self, layout: SequenceLayout) -> None:
        """Raise ConfigError for a layout whose lengths are not those of the slots.

        A layout with a `device_layout` is not checked: the code that created it checks the lengths.
        """
        if layout.device_layout is not None:
            return
        if len(set(layout.slots)) < len(layout.segments):
            raise ConfigError(
                f"the layout has {len(layout.segments)} sequences in slots {layout.slots}; with a "
                "state each needs a slot of its own, as in layout=state.layout(lengths)"
            )
        held = tuple(self.lengths[slot] for slot in layout.slots)
        if layout.cached_lengths != held:
            raise ConfigError(
                f"the layout continues sequences of {layout.cached_lengths} tokens, but the state "
                f"holds {held}; make a new layout for each call with state.layout(lengths)"
            )

    def takes_steps(self, layout: SequenceLayout) -> bool:
        """Whether all layers update their states in place, token by token, in this call."""
        return layout.is_step and all(layer.takes_steps(layout) for layer in self._with_rows)

    def advance(self, layout: SequenceLayout) -> None:
        """Add the tokens of a finished call to the lengths; after a verification `accept` does."""
        if layout.is_verification or layout.device_layout is not None:
            return
        for slot, length in zip(layout.slots, layout.segments.lengths, strict=True):
            self.lengths[slot] += length

    def accept(self, layout: SequenceLayout, counts: Sequence[int]) -> None:
        """Accept the first `counts` tokens (at least one) of each sequence of a verification."""
        assert layout.is_verification, "only a verification call can be accepted in part"
        for slot, count, length in zip(layout.slots, counts, layout.segments.lengths, strict=True):
            assert 1 <= count <= length, f"{count} of {length} tokens cannot be accepted"
            self.lengths[slot] += count
        if not self._with_rows:
            return
        all_steps = {layer.intermediate_states[0].shape[1] for layer in self._with_rows}
        steps = max(all_steps)
        assert all_steps == {steps}, f"intermediate states of {all_steps} steps: a layer left none"
        assert steps >= layout.segments.max_length, "no layer left intermediate states"
        places = [row * steps + count - 1 for row, count in enumerate(counts)]
        copy_rows(
            [rows for layer in self._with_rows for rows in layer.rows],
            layout.slot_index(self.device),
            [
                intermediate.flatten(0, 1)
                for layer in self._with_rows
                for intermediate in layer.intermediate_states
            ],
            torch.tensor(places, device=self.device),
        )

    def free(self, slot: int) -> None:
        """Empty a slot."""
        self.pool.release(self.table.rows[slot])
        self.table.set(slot, [])
        self._writable[slot] = _NOWHERE
        self.lengths[slot] = 0
        if self.drafts is not None:
            self.drafts.clear(slot)
        for layer in self._with_rows:
            layer.clear(slot)

    def snapshot(self, slot: int) -> Snapshot:
        """Copy the state of a slot; its pages are shared."""
        pages = tuple(self.table.rows[slot][: self.table.pages_for(self.lengths[slot])])
        self.pool.share(pages)
        self._writable[slot] = _NOWHERE
        length = self.lengths[slot]
        return Snapshot(
            length,
            pages,
            tuple(layer.copy(slot) for layer in self._with_rows),
            None if self.drafts is None else self.drafts.snapshot(slot, length),
        )

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Put the state of a snapshot into a slot; the snapshot stays valid."""
        self.pool.share(snapshot.pages)
        self.pool.release(self.table.rows[slot])
        self.table.set(slot, snapshot.pages)
        self._writable[slot] = _NOWHERE
        self.lengths[slot] = snapshot.length
        for layer, rows in zip(self._with_rows, snapshot.states, strict=True):
            layer.put(slot, rows)
        if self.drafts is not None:
            assert snapshot.drafts is not None, "the snapshot is of another cache"
            self.drafts.restore(slot, snapshot.drafts)

    def drop(self, snapshot: Snapshot) -> None:
        """Release the pages of a snapshot; it must not be used again."""
        self.pool.release(snapshot.pages)

    def fork(self, source: int, target: int) -> None:
        """Copy the state of slot `source` to slot `target`."""
        snapshot = self.snapshot(source)
        self.restore(target, snapshot)
        self.drop(snapshot)

    def _shared_places(self, slot: int) -> list[int]:
        """Indices of a slot's pages that the next call writes to although they are shared."""
        row = self.table.rows[slot]
        first = self._first_written(slot) // self.table.page_size
        return [place for place in range(first, len(row)) if self.pool.is_shared(row[place])]

    def _first_written(self, slot: int) -> int:
        """The first position of a slot that the next call may write to."""
        if self.drafts is not None and self.draft_layers:
            return min(self.lengths[slot], self.drafts.lengths[slot])
        return self.lengths[slot]


def _new_state(mixer: StatefulLayerConfig, memory: StateMemory) -> LayerState | None:
    state = mixer.new_state(memory)
    if (state is not None) != mixer.is_stateful:
        raise ConfigError(
            f"{type(mixer).__name__}.state_size is {mixer.state_size}, but its new_state returns "
            f"{'no state' if state is None else 'a state'}; make the two agree"
        )
    return state


def _key_scales(
    precision: StatePrecision, mixers: Sequence[StatefulLayerConfig]
) -> list[tuple[float, float]]:
    """Scales of keys and values for each layer; `key_scales` has those of attention layers only."""
    given = precision.key_scales
    scaled = [mixer.state_size.per_token > 0 for mixer in mixers]
    if given and len(given) < sum(scaled):
        raise ConfigError(
            f"key_scales has {len(given)} pairs for {sum(scaled)} layers with keys and values; "
            "give one for each"
        )
    scales = iter(given)
    return [next(scales) if given and has_keys else (1.0, 1.0) for has_keys in scaled]
