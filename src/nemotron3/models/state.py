"""What one layer carries between calls: keys and values, or a convolution tail and a scan's state.

Both kinds are rows for slots. A call's layout says which slots its sequences use; the mixer asks
its state to continue them. `HybridCache` (cache.py) holds the states of all layers and is the only
one who gives slots, pages and lengths away.
"""

import torch
from torch import Tensor

from nemotron3.models.config import AttentionConfig, MambaConfig
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.pages import PageTable


class MambaState:
    """Convolution tails and state-space states of one Mamba layer, one row per slot.

    A tentative call (see `SequenceLayout`) changes neither: what they would be after each of its
    tokens goes into the trails, and `accept` takes from there what came true.
    """

    def __init__(
        self, config: MambaConfig, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tails = torch.zeros(
            slots, config.conv_kernel - 1, config.conv_channels, dtype=dtype, device=device
        )
        # States accumulate over the whole sequence, so they are never kept below float32.
        self.states = torch.zeros(
            slots,
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.ssm_state_size,
            dtype=torch.promote_types(dtype, torch.float32),
            device=device,
        )
        self._tail_trail = self.tails.new_empty(0, 0, *self.tails.shape[1:])
        self._state_trail = self.states.new_empty(0, 0, *self.states.shape[1:])

    def read(self, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Tails and states of the layout's sequences."""
        slots = layout.slot_index(self.tails.device)
        return self.tails[slots], self.states[slots]

    def write(self, layout: SequenceLayout, tails: Tensor, states: Tensor) -> None:
        """Keep the tails and states after the call."""
        slots = layout.slot_index(self.tails.device)
        self.tails[slots] = tails.detach().to(self.tails.dtype)
        self.states[slots] = states.detach()

    def trails(self, layout: SequenceLayout) -> tuple[Tensor | None, Tensor | None]:
        """Where a tentative call leaves tails and states after each token; else None."""
        if not layout.is_tentative:
            return None, None
        rows, steps = len(layout.segments), layout.segments.max_length
        if rows > self._tail_trail.shape[0] or steps > self._tail_trail.shape[1]:
            room = (
                max(rows, self._tail_trail.shape[0]),
                max(steps, self._tail_trail.shape[1]),
            )
            self._tail_trail = self.tails.new_empty(*room, *self.tails.shape[1:])
            self._state_trail = self.states.new_empty(*room, *self.states.shape[1:])
        return self._tail_trail[:rows, :steps], self._state_trail[:rows, :steps]

    def tensors(self) -> tuple[Tensor, ...]:
        """Its memory."""
        return self.tails, self.states, self._tail_trail, self._state_trail

    def accept(self, slots: Tensor, rows: Tensor, last: Tensor) -> None:
        """After a tentative call, let row `rows[i]` of it have ended with its token `last[i]`."""
        self.tails[slots] = self._tail_trail[rows, last]
        self.states[slots] = self._state_trail[rows, last]

    def clear(self, slot: int) -> None:
        """Make a slot the beginning of a sequence."""
        self.tails[slot].zero_()
        self.states[slot].zero_()

    def copy(self, slot: int) -> tuple[Tensor, Tensor]:
        """What a slot holds, as tensors of their own."""
        return self.tails[slot].clone(), self.states[slot].clone()

    def put(self, slot: int, kept: tuple[Tensor, Tensor]) -> None:
        """Let a slot hold what `copy` returned."""
        self.tails[slot].copy_(kept[0])
        self.states[slot].copy_(kept[1])


class AttentionState:
    """Keys and values of one attention layer, in pages that the cache hands out."""

    def __init__(
        self,
        config: AttentionConfig,
        pages: int,
        table: PageTable,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.table = table
        shape = (pages, table.page_size, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, layout: SequenceLayout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the call's keys and values; returns all of each sequence, packed."""
        keys, values = ([], [])
        sequences = zip(
            layout.slots,
            layout.context,
            k.split(layout.segments.lengths),
            v.split(layout.segments.lengths),
            strict=True,
        )
        for slot, old, new_k, new_v in sequences:
            places = self.table.positions(slot, 0, old + len(new_k))
            for pool, new, parts in ((self.keys, new_k, keys), (self.values, new_v, values)):
                flat = pool.flatten(0, 1)
                flat[places[old:]] = new.detach().to(pool.dtype)
                if old and new.dtype == pool.dtype and not new.requires_grad:
                    parts.append(flat[places])  # of a million keys one copy, not two
                else:
                    parts += [flat[places[:old]].to(new.dtype), new] if old else [new]
        return _joined(keys), _joined(values)

    def tensors(self) -> tuple[Tensor, ...]:
        """Its memory."""
        return self.keys, self.values

    def grow(self, pages: int) -> None:
        """Make room for so many pages in all."""
        more = pages - len(self.keys)
        if more > 0:
            grow = (0, 0, 0, 0, 0, 0, 0, more)
            self.keys = torch.nn.functional.pad(self.keys, grow)
            self.values = torch.nn.functional.pad(self.values, grow)

    def copy_page(self, source: int, target: int) -> None:
        """Copy what a page holds into another."""
        self.keys[target] = self.keys[source]
        self.values[target] = self.values[source]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


LayerState = MambaState | AttentionState
