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

Keys and values lie in shared pages, so a snapshot costs little more than the Mamba layers' states:
some megabytes, however long the sequence is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models.cache.pages import PagePool, PageTable
from nemotron3.models.cache.state import AttentionState, LayerState, MambaState
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.config import ModelConfig
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.pattern import LayerKind
from nemotron3.ops.gather import copy_rows
from nemotron3.ops.segments import Segments

PAGE_SIZE = 64
"""Tokens of a page: long runs for kernels, and little lost in the last page of a sequence."""


class PendingTokens(NamedTuple):
    """Tokens of a sequence that the multi-token-prediction block has yet to read."""

    tokens: tuple[int, ...]
    hidden: Float[Tensor, "tokens d_model"]
    """The model's state before each of them."""

    @classmethod
    def join(cls, parts: "Sequence[PendingTokens]") -> "PendingTokens":
        """Parts that follow one another as one."""
        tokens = tuple(token for part in parts for token in part.tokens)
        return cls(tokens, torch.cat([part.hidden for part in parts]))


@dataclass(frozen=True)
class Snapshot:
    """What a slot held at one moment; give it back with `HybridCache.drop`."""

    length: int
    draft_length: int
    pages: tuple[int, ...]
    states: tuple[tuple[Tensor, ...], ...]
    """Convolution and scan states of each Mamba layer, as they are kept."""
    hidden: Tensor | None
    """The model's state at the last token, where drafts are made."""
    pending: PendingTokens | None
    """What the draft block had yet to read, without the last: what comes there may be another."""

    @property
    def nbytes(self) -> int:
        """Memory of its own, without the pages that it shares."""
        pending = 0 if self.pending is None else self.pending.hidden.nbytes
        return pending + sum(part.nbytes for state in self.states for part in state)


class HybridCache:
    """States of all layers for a number of slots.

    It carries values and no gradients: what an earlier call left behind is a constant to the next.
    With `pages` the memory of keys and values is fixed, and `layout` raises OverloadedError when
    it is used up; without, it grows. `max_length` fixes the width of the page table likewise.
    """

    def __init__(  # noqa: PLR0913
        self,
        config: ModelConfig,
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
        self.draft_lengths = [0] * slots
        """How much of each sequence the multi-token-prediction block has read."""
        self.pending: list[list[PendingTokens]] = [[] for _ in range(slots)]
        """What it has yet to read of it, in parts. Both together are as long as the sequence while
        it is written, and one token shorter in a prompt, whose next token is not known."""
        self.pool = PagePool(pages)
        self.table = PageTable(slots, page_size, -(-max_length // page_size), device)

        key_scales = _key_scales(precision, config, drafts=drafts)

        def build(layer: int, kind: LayerKind) -> LayerState | None:
            if kind is LayerKind.MAMBA:
                assert config.mamba is not None
                return MambaState(
                    config.mamba, slots, dtype, device, precision=precision, layer=layer
                )
            if kind is LayerKind.ATTENTION:
                assert config.attention is not None
                return AttentionState(
                    config.attention, pages or 0, self.table, self.keys_dtype, device,
                    scales=next(key_scales),
                )  # fmt: skip
            return None

        main, draft = config.pattern.main, config.pattern.mtp if drafts else ()
        self.layers = [build(layer, kind) for layer, kind in enumerate(main)]
        self.draft_layers = [build(layer, kind) for layer, kind in enumerate(draft, len(main))]
        self.hidden = (
            torch.zeros(slots, config.hidden_size, dtype=dtype, device=device) if drafts else None
        )
        """The model's state at the last token of each prompt, which the block reads with the next
        one; of a sequence that is written, at the last token that the block has read."""
        self._mamba = [layer for layer in self.layers if isinstance(layer, MambaState)]
        self._attention = [
            layer
            for layer in (*self.layers, *self.draft_layers)
            if isinstance(layer, AttentionState)
        ]

    @property
    def state_nbytes(self) -> int:
        """Memory of the Mamba layers' states, whatever the sequences' lengths."""
        return sum(part.nbytes for layer in self._mamba for part in layer.kept)

    def addresses(self) -> tuple[int, ...]:
        """Where what may grow lies: the same until a tensor is replaced by a larger one.

        Layers of a kind grow together, so it asks the first of each.
        """
        tensors = [self.table.tensor]
        if self._mamba:
            tensors += self._mamba[0].intermediate_states
        if self._attention:
            tensors.append(self._attention[0].keys)
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
        if not self._attention:
            return 0
        more = self.table.pages_for(self.lengths[slot] + new_tokens) - len(self.table.rows[slot])
        return max(more, 0) + len(self._shared_places(slot))

    def reserve(self, slot: int, new_tokens: int) -> None:
        """Take the pages for so many more tokens; all or none."""
        missing = self.missing_pages(slot, new_tokens)
        if missing <= 0:
            return
        taken = self.pool.take(missing)
        for layer in self._attention:
            layer.grow(len(self.pool))
        for place in self._shared_places(slot):
            shared, copy = self.table.rows[slot][place], taken.pop()
            for layer in self._attention:
                layer.copy_page(shared, copy)
            self.table.replace(slot, place, copy)
            self.pool.release([shared])
        self.table.extend(slot, taken)

    def check(self, layout: SequenceLayout) -> None:
        """Refuse a layout that does not continue what the slots hold.

        One with a `device_layout` is not looked at: it is `StepRunner`'s, who checks and counts.
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
        return layout.is_step and all(layer.takes_steps(layout) for layer in self._mamba)

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
        if not self._mamba:
            return
        steps = self._mamba[0].intermediate_states[0].shape[1]
        places = [row * steps + count - 1 for row, count in enumerate(counts)]
        copy_rows(
            [kept for layer in self._mamba for kept in layer.kept],
            layout.slot_index(self.device),
            [
                intermediate.flatten(0, 1)
                for layer in self._mamba
                for intermediate in layer.intermediate_states
            ],
            torch.tensor(places, device=self.device),
        )

    def free(self, slot: int) -> None:
        """Empty a slot."""
        self.pool.release(self.table.rows[slot])
        self.table.set(slot, [])
        self.lengths[slot] = self.draft_lengths[slot] = 0
        self.pending[slot] = []
        for layer in self._mamba:
            layer.clear(slot)

    def snapshot(self, slot: int) -> Snapshot:
        """Keep what a slot holds."""
        pages = tuple(self.table.rows[slot][: self.table.pages_for(self.lengths[slot])])
        self.pool.share(pages)
        # Of what the draft block reads the last depends on the token that comes next, which is
        # another wherever one goes on from here: it is taken back.
        draft_length, pending = self.draft_lengths[slot], None
        hidden = None if self.hidden is None else self.hidden[slot].clone()
        if not self.pending[slot]:
            draft_length = max(min(draft_length, self.lengths[slot] - 1), 0)
        else:
            tokens, before = PendingTokens.join(self.pending[slot])
            hidden = before[-1]
            pending = PendingTokens(tokens[:-1], before[:-1]) if len(tokens) > 1 else None
        return Snapshot(
            self.lengths[slot],
            draft_length,
            pages,
            tuple(layer.copy(slot) for layer in self._mamba),
            hidden,
            pending,
        )

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Let a slot hold what a snapshot kept; the snapshot stays."""
        self.pool.share(snapshot.pages)
        self.pool.release(self.table.rows[slot])
        self.table.set(slot, snapshot.pages)
        self.lengths[slot] = snapshot.length
        self.draft_lengths[slot] = snapshot.draft_length
        self.pending[slot] = [] if snapshot.pending is None else [snapshot.pending]
        for layer, kept in zip(self._mamba, snapshot.states, strict=True):
            layer.put(slot, kept)
        if self.hidden is not None and snapshot.hidden is not None:
            self.hidden[slot] = snapshot.hidden

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
        is_behind = self.draft_layers and self.draft_lengths[slot] < self.lengths[slot]
        start = self.draft_lengths[slot] if is_behind else self.lengths[slot]
        row = self.table.rows[slot]
        first = start // self.table.page_size
        return [place for place in range(first, len(row)) if self.pool.is_shared(row[place])]


def _key_scales(
    precision: StatePrecision, config: ModelConfig, *, drafts: bool
) -> Iterator[tuple[float, float]]:
    """Scales of keys and values, an attention layer after another."""
    kinds = (*config.pattern.main, *(config.pattern.mtp if drafts else ()))
    layers, given = kinds.count(LayerKind.ATTENTION), precision.key_scales
    if given and len(given) < layers:
        raise ConfigError(
            f"key_scales has {len(given)} pairs for {layers} attention layers; give one for each"
        )
    return iter(given or ((1.0, 1.0),) * layers)
