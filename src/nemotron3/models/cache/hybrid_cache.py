"""The carried state of a whole model, and the verbs by which everything else handles it.

One `HybridCache` serves a number of sequences, each in a slot of its own. A call says in its layout
which slots its sequences use and how much they hold already; each layer then reads and writes its
own part, and the model advances the lengths when the call is done.

    cache = model.new_state(slots=2)
    model(prompt, layout=cache.layout([7, 3]), state=cache)   # two prompts, packed
    model(tokens, layout=cache.layout([1, 1]), state=cache)   # one more token each

Sequences come and go by four verbs, whatever their layers keep: `snapshot` keeps what a slot holds,
`restore` lets a slot hold it again, `fork` lets a slot hold what another does, `free` empties one.
Prefix caching, several answers to one prompt and preemption are made of these. A fifth pair serves
drafts that may be refused: a verification call changes nothing until `accept` says how far it
stands.

What is kept of each token lies in shared pages, so a snapshot costs little more than what is kept
of each sequence: some megabytes, however long the sequence is. What a layer keeps is its own
business (`LayerState`): the cache knows no kinds of layers.
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

PAGE_SIZE = 64
"""Tokens of a page: long runs for kernels, and little lost in the last page of a sequence."""


@dataclass(frozen=True)
class Snapshot:
    """What a slot held at one moment; give it back with `HybridCache.drop`."""

    length: int
    pages: tuple[int, ...]
    states: tuple[Parts, ...]
    """Rows of each layer that keeps some, in the order of layers."""
    drafts: DraftSnapshot | None
    """What the draft block held, where there is one."""

    @property
    def nbytes(self) -> int:
        """Memory of its own, without the pages that it shares."""
        drafts = 0 if self.drafts is None else self.drafts.nbytes
        return drafts + sum(part.nbytes for state in self.states for part in state)


class HybridCache:
    """States of all layers for a number of slots.

    It carries values and no gradients: what an earlier call left behind is a constant to the next.
    With `pages` the memory of keys and values is fixed, and `layout` raises OverloadedError when
    it is used up; without, it grows. `max_length` fixes the width of the page table likewise.
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
        """How far the multi-token-prediction block is, where it drafts."""
        self._with_rows = [layer for layer in self.layers if layer is not None and layer.rows]
        self._with_pages = [layer for layer in states if layer is not None and layer.pages]
        if any(layer is not None and layer.rows for layer in self.draft_layers):
            raise ConfigError(
                "the multi-token-prediction block has layers that keep a state of each sequence, "
                "which drafts cannot be taken back from; make the cache without drafts"
            )

    @property
    def state_nbytes(self) -> int:
        """Memory of what is kept of each sequence, whatever the sequences' lengths."""
        return sum(rows.nbytes for layer in self._with_rows for rows in layer.rows)

    def addresses(self) -> tuple[int, ...]:
        """Where what may grow lies: the same until a tensor is replaced by a larger one.

        All trails grow in the same calls and all pages together, so it asks the first layer's.
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
        """The layout of a call that brings `lengths` new tokens to `slots` (all, where omitted).

        Takes the pages that the call will fill.
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
        """Pages that must be taken before a slot can hold so many more tokens."""
        if not self._with_pages:
            return 0
        more = self.table.pages_for(self.lengths[slot] + new_tokens) - len(self.table.rows[slot])
        return max(more, 0) + len(self._shared_places(slot))

    def reserve(self, slot: int, new_tokens: int) -> None:
        """Take the pages for so many more tokens; all or none."""
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
        """Refuse a layout that does not continue what the slots hold.

        One with a `device_layout` is not looked at: whoever makes one checks and counts.
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
        """Whether a call without gradients goes on in place, token by token, in every layer."""
        return layout.is_step and all(layer.takes_steps(layout) for layer in self._with_rows)

    def advance(self, layout: SequenceLayout) -> None:
        """Count the tokens of a finished call; of drafts, `accept` counts them."""
        if layout.is_verification or layout.device_layout is not None:
            return
        for slot, length in zip(layout.slots, layout.segments.lengths, strict=True):
            self.lengths[slot] += length

    def accept(self, layout: SequenceLayout, counts: Sequence[int]) -> None:
        """Let the first `counts` tokens (one at least) of each sequence stand, after a try."""
        assert layout.is_verification, "only a verification call can be accepted in part"
        for slot, count, length in zip(layout.slots, counts, layout.segments.lengths, strict=True):
            assert 1 <= count <= length, f"{count} of {length} tokens cannot stand"
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
        self.lengths[slot] = 0
        if self.drafts is not None:
            self.drafts.clear(slot)
        for layer in self._with_rows:
            layer.clear(slot)

    def snapshot(self, slot: int) -> Snapshot:
        """Keep what a slot holds."""
        pages = tuple(self.table.rows[slot][: self.table.pages_for(self.lengths[slot])])
        self.pool.share(pages)
        length = self.lengths[slot]
        return Snapshot(
            length,
            pages,
            tuple(layer.copy(slot) for layer in self._with_rows),
            None if self.drafts is None else self.drafts.snapshot(slot, length),
        )

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Let a slot hold what a snapshot kept; the snapshot stays."""
        self.pool.share(snapshot.pages)
        self.pool.release(self.table.rows[slot])
        self.table.set(slot, snapshot.pages)
        self.lengths[slot] = snapshot.length
        for layer, rows in zip(self._with_rows, snapshot.states, strict=True):
            layer.put(slot, rows)
        if self.drafts is not None:
            assert snapshot.drafts is not None, "the snapshot is another cache's"
            self.drafts.restore(slot, snapshot.drafts)

    def drop(self, snapshot: Snapshot) -> None:
        """Give a snapshot's pages back; it must not be used again."""
        self.pool.release(snapshot.pages)

    def fork(self, source: int, target: int) -> None:
        """Let slot `target` hold what `source` does."""
        snapshot = self.snapshot(source)
        self.restore(target, snapshot)
        self.drop(snapshot)

    def _shared_places(self, slot: int) -> list[int]:
        """Places of the pages that the next call writes into and someone else holds too."""
        start = self.lengths[slot]
        if self.drafts is not None and self.draft_layers:
            start = min(start, self.drafts.lengths[slot])
        row = self.table.rows[slot]
        first = start // self.table.page_size
        return [place for place in range(first, len(row)) if self.pool.is_shared(row[place])]


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
    """Scales of keys and values for each layer; those given are for layers that have some."""
    given = precision.key_scales
    scaled = [mixer.state_size.per_token > 0 for mixer in mixers]
    if given and len(given) < sum(scaled):
        raise ConfigError(
            f"key_scales has {len(given)} pairs for {sum(scaled)} layers with keys and values; "
            "give one for each"
        )
    scales = iter(given)
    return [next(scales) if given and has_keys else (1.0, 1.0) for has_keys in scaled]
