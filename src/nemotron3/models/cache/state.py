"""The state that one layer carries between calls, and what the cache needs to know of a layer.

A layer keeps rows, one for each sequence (a convolution state, an SSM state), or pages with an
entry for each token (keys and values), or both. The layout of a call says which slots its sequences
use, and the mixer reads and writes these slots. `HybridCache` (hybrid_cache.py) holds the states of
all layers; it alone assigns slots and pages and counts lengths. It sees a mixer only as a
`StatefulLayerConfig`, so this package imports no mixer and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.models.cache.pages import PageTable, page_memory
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.layout import SequenceLayout

Parts = tuple[Tensor, ...]


class StateSize(NamedTuple):
    """Number of elements of a layer's state; costs and the engine's memory are computed from it."""

    accumulated: int = 0
    """For each sequence, accumulated over its tokens; float32 by default (`StatePrecision`)."""
    activations: int = 0
    """For each sequence, in the dtype of activations."""
    per_token: int = 0
    """For each token, in the dtype of keys and values."""

    @property
    def per_sequence(self) -> int:
        """For each sequence, at any length."""
        return self.accumulated + self.activations


@dataclass(frozen=True, kw_only=True)
class StateMemory:
    """The arguments with which a layer makes its state."""

    slots: int
    pages: int
    table: PageTable
    dtype: torch.dtype
    """Dtype of activations."""
    device: torch.device
    precision: StatePrecision
    layer: int
    """Index of the layer, from which its random bits are computed."""
    key_scales: tuple[float, float] = (1.0, 1.0)
    """Keys and values are divided by these before they are stored."""

    def rows(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros for each slot, and for padding, whose slot -1 is the last row."""
        return torch.zeros(self.slots + 1, *shape, dtype=dtype or self.dtype, device=self.device)

    def page_entries(self, *shape: int) -> Tensor:
        """Zeros for each token of each page."""
        dtype = self.precision.keys_dtype(self.dtype)
        return page_memory((self.pages, self.table.page_size, *shape), dtype, self.device)


class LayerState:
    """The carried state of one layer.

    A verification call (see `SequenceLayout`) does not change the rows; it writes the rows after
    each of its tokens into `intermediate_states_for(layout)`, and `HybridCache.accept` copies those
    after the last accepted token. Entries of pages need no such copies: those of rejected tokens
    are overwritten.
    """

    def __init__(self, *, rows: Parts = (), pages: Parts = ()) -> None:
        self.rows = rows
        """[slot, ...], the state of each sequence."""
        self.pages = pages
        """[page, place, ...], the entries of each token."""
        self.intermediate_states: Parts = tuple(t.new_empty(0, 0, *t.shape[1:]) for t in rows)
        """[sequence of a call, step, ...] for each of the rows."""

    def takes_steps(self, layout: SequenceLayout) -> bool:
        """Whether a call updates the state in place, token by token."""
        return layout.is_step

    def intermediate_states_for(self, layout: SequenceLayout) -> Parts:
        """Memory for the rows after each token of a verification call; empty for other calls."""
        if not layout.is_verification:
            return ()
        rows, steps = len(layout.segments), layout.segments.max_length
        have = self.intermediate_states[0].shape
        if rows > have[0] or steps > have[1]:
            room = max(rows, have[0]), max(steps, have[1])
            self.intermediate_states = tuple(t.new_empty(*room, *t.shape[1:]) for t in self.rows)
        return tuple(intermediate[:rows, :steps] for intermediate in self.intermediate_states)

    def clear(self, slot: int) -> None:
        """Reset a slot to the state before a sequence."""
        for rows in self.rows:
            rows[slot].zero_()

    def copy(self, slot: int) -> Parts:
        """Copies of the rows of a slot."""
        return tuple(rows[slot].clone() for rows in self.rows)

    def put(self, slot: int, copied: Parts) -> None:
        """Write rows that `copy` returned into a slot."""
        for rows, copy in zip(self.rows, copied, strict=True):
            rows[slot].copy_(copy)

    def grow(self, pages: int) -> None:
        """Extend the memory to this number of pages."""
        self.pages = tuple(_with_length(entries, pages) for entries in self.pages)

    def copy_page(self, source: int, target: int) -> None:
        """Copy the entries of one page to another."""
        for entries in self.pages:
            entries[target] = entries[source]

    def tensors(self) -> Parts:
        """All tensors of the state."""
        return *self.rows, *self.intermediate_states, *self.pages


class StatefulLayerConfig(Protocol):
    """The interface of a layer's configuration to the cache (`models.mixer.MixerConfig`)."""

    @property
    def state_size(self) -> StateSize:
        """The size of the layer's state."""
        ...

    @property
    def is_stateful(self) -> bool:
        """Whether the layer has a state."""
        ...

    def new_state(self, memory: StateMemory) -> LayerState | None:
        """An empty state; None for a layer without state."""
        ...


class CachedModelConfig(Protocol):
    """The interface of a model's configuration to the cache (`models.config.ModelConfig`)."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def layers(self) -> Sequence[StatefulLayerConfig]:
        """The layers of the backbone."""
        ...

    @property
    def mtp_layers(self) -> Sequence[StatefulLayerConfig]:
        """The layers of the multi-token-prediction block."""
        ...


def _with_length(entries: Tensor, length: int) -> Tensor:
    more = length - len(entries)
    if more <= 0:
        return entries
    return F.pad(entries, (*(0, 0) * (entries.dim() - 1), 0, more))
