"""What one layer carries between calls: keys and values, or the states of a convolution and a scan.

Both kinds are rows for slots. A call's layout says which slots its sequences use; the mixer asks
its state to continue them. `HybridCache` (models/hybrid_cache.py) holds the states of all layers
and is the only one who gives slots, pages and lengths away.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.cache.pages import PageTable, page_memory
from nemotron3.models.cache.state_format import Parts, StateFormat
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.config import AttentionConfig, MambaConfig
from nemotron3.models.layout import SequenceLayout
from nemotron3.ops.attention import attention_steps
from nemotron3.ops.ssd import ssd_steps


class MambaState:
    """Convolution and scan states of one Mamba layer, one row per slot.

    A verification call (see `SequenceLayout`) changes neither: what they would be after each of its
    tokens goes into the intermediate states, and `HybridCache.accept` takes from there what stands.
    """

    def __init__(
        self,
        config: MambaConfig,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        precision: StatePrecision,
        layer: int,
    ) -> None:
        self.conv_states = torch.zeros(
            slots, config.conv_kernel - 1, config.conv_channels, dtype=dtype, device=device
        )
        # States accumulate over the whole sequence, so they are computed in float32 at least.
        self.format = StateFormat(precision, layer, torch.promote_types(dtype, torch.float32))
        # Of narrow ones a last row is nobody's: there the padding of a call goes, slot -1.
        self.ssm_states = self.format.zeros(
            slots + self.format.is_narrow,
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.ssm_state_size,
            device=device,
        )
        self.intermediate_states: Parts = tuple(t.new_empty(0, 0, *t.shape[1:]) for t in self.kept)
        """[row of a call, step, ...] for each of what is kept."""

    def read(self, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Convolution and scan states of the layout's sequences."""
        slots = layout.slot_index(self.conv_states.device)
        return self.conv_states[slots], self._rows(slots)

    def write(self, layout: SequenceLayout, conv_states: Tensor, ssm_states: Tensor) -> None:
        """Keep the convolution and scan states after the call."""
        device = self.conv_states.device
        slots = layout.slot_index(device)
        lengths = torch.tensor(layout.segments.lengths, device=device)
        self.conv_states[slots] = conv_states.detach().to(self.conv_states.dtype)
        parts = self.format.quantize(
            ssm_states.detach(), layout.cached_lengths_tensor(device) + lengths
        )
        self._put_rows(slots, parts)

    def takes_steps(self, layout: SequenceLayout) -> bool:
        """Whether a call goes on in place, token by token.

        A prompt is rounded where the call ends, however short it is, so that its neighbours in the
        call do not matter.
        """
        return layout.is_step and not (layout.is_prompt and self.format.is_narrow)

    def conv_intermediate_states(self, layout: SequenceLayout) -> Tensor | None:
        """Where a verification call leaves the convolution states after each token; else None."""
        intermediate_states = self._intermediate_states_for(layout)
        return intermediate_states[0] if intermediate_states else None

    def scan(
        self,
        layout: SequenceLayout,
        operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    ) -> Float[Tensor, "tokens head head_dim"]:
        """Steps of the scan on `operands` x, dt, A, B, C and D, from the states, in place."""
        device = self.conv_states.device
        slots, intermediate_states = (
            layout.slot_index(device),
            self._intermediate_states_for(layout)[1:],
        )
        if not self.format.is_narrow:
            (ssm_states,), intermediate = (
                self.ssm_states,
                intermediate_states[0] if intermediate_states else None,
            )
            return ssd_steps(*operands, ssm_states, slots, intermediate_states=intermediate)
        rows = len(layout.segments)
        x, dt, A, B, C, D = operands
        of_tokens = [t.unflatten(0, (rows, -1)) for t in (x, dt, B, C)]
        every = torch.arange(rows, device=device)
        positions = layout.cached_lengths_tensor(device)
        ssm_states, kept, outputs = self._rows(slots), (), []
        for t in range(layout.segments.max_length):
            x, dt, B, C = (tokens[:, t] for tokens in of_tokens)
            outputs.append(ssd_steps(x, dt, A, B, C, D, ssm_states, every))
            positions = positions + 1
            kept = self.format.quantize(ssm_states, positions)
            for intermediate, part in zip(
                intermediate_states, kept, strict=bool(intermediate_states)
            ):
                intermediate[:, t] = part
            ssm_states = self.format.dequantize(kept)
        if not intermediate_states:
            self._put_rows(slots, kept)
        return torch.stack(outputs, dim=1).flatten(0, 1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Its memory."""
        return *self.kept, *self.intermediate_states

    @property
    def kept(self) -> Parts:
        """What it keeps of each slot."""
        return self.conv_states, *self.ssm_states

    def clear(self, slot: int) -> None:
        """Make a slot the beginning of a sequence."""
        for kept in self.kept:
            kept[slot].zero_()

    def copy(self, slot: int) -> Parts:
        """What a slot holds, as tensors of their own."""
        return tuple(kept[slot].clone() for kept in self.kept)

    def put(self, slot: int, copied: Parts) -> None:
        """Let a slot hold what `copy` returned."""
        for kept, copy in zip(self.kept, copied, strict=True):
            kept[slot].copy_(copy)

    def _rows(self, slots: Tensor) -> Tensor:
        return self.format.dequantize(tuple(part[slots] for part in self.ssm_states))

    def _put_rows(self, slots: Tensor, parts: Parts) -> None:
        for kept, part in zip(self.ssm_states, parts, strict=True):
            kept[slots] = part

    def _intermediate_states_for(self, layout: SequenceLayout) -> Parts:
        """Intermediate convolution and scan states for a verification call, else none."""
        if not layout.is_verification:
            return ()
        rows, steps = len(layout.segments), layout.segments.max_length
        have = self.intermediate_states[0].shape
        if rows > have[0] or steps > have[1]:
            room = max(rows, have[0]), max(steps, have[1])
            self.intermediate_states = tuple(t.new_empty(*room, *t.shape[1:]) for t in self.kept)
        return tuple(intermediate[:rows, :steps] for intermediate in self.intermediate_states)


class AttentionState:
    """Keys and values of one attention layer, in pages that the cache hands out.

    What attention sees is what is kept, so that narrow keys are the same ones for the call that
    brings them and for every later one. `scales` are what keys and values are divided by.
    """

    def __init__(
        self,
        config: AttentionConfig,
        pages: int,
        table: PageTable,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        self.table = table
        self.scales = scales
        shape = (pages, table.page_size, config.num_key_value_heads, config.head_dim)
        self.keys = page_memory(shape, dtype, device)
        self.values = page_memory(shape, dtype, device)

    def write_kv(self, layout: SequenceLayout, k: Tensor, v: Tensor) -> None:
        """Write the call's keys and values."""
        lengths = layout.segments.lengths
        at = _joined(
            [
                self.table.positions(slot, old, old + new)
                for slot, old, new in zip(layout.slots, layout.cached_lengths, lengths, strict=True)
            ]
        )
        for pool, new, scale in ((self.keys, k, self.scales[0]), (self.values, v, self.scales[1])):
            pool.flatten(0, 1)[at] = self._quantized(new.detach(), scale)

    def extend(self, layout: SequenceLayout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the call's keys and values; returns all of each sequence, packed."""
        self.write_kv(layout, k, v)
        scale_k, scale_v = self.scales
        return (
            self._gathered_kv(layout, self.keys, k, scale_k),
            self._gathered_kv(layout, self.values, v, scale_v),
        )

    def _gathered_kv(
        self, layout: SequenceLayout, pool: Tensor, new: Tensor, scale: float
    ) -> Tensor:
        """What a pool holds of each sequence; `new` is what came last."""
        is_narrow = pool.dtype != new.dtype
        if not is_narrow and not any(layout.cached_lengths):
            return new
        flat, parts = pool.flatten(0, 1), []
        news = new.split(layout.segments.lengths)
        for slot, old, last in zip(layout.slots, layout.cached_lengths, news, strict=True):
            if is_narrow:
                places = self.table.positions(slot, 0, old + len(last))
                parts.append(flat[places].to(new.dtype) * scale)
            elif old and not new.requires_grad:  # of a million keys one copy, not two
                parts.append(flat[self.table.positions(slot, 0, old + len(last))])
            else:
                parts += [flat[self.table.positions(slot, 0, old)], last] if old else [last]
        return _joined(parts)

    def tensors(self) -> tuple[Tensor, ...]:
        """Its memory."""
        return self.keys, self.values

    def attend(
        self,
        layout: SequenceLayout,
        q: Float[Tensor, "tokens head head_dim"],
        k: Float[Tensor, "tokens kv_head head_dim"],
        v: Float[Tensor, "tokens kv_head head_dim"],
    ) -> Float[Tensor, "tokens head head_dim"]:
        """Write a step's keys and values, and attend to all of each sequence."""
        scale_k, scale_v = self.scales
        if self.keys.dtype != k.dtype:
            q = q * scale_k
            k = self._quantized(k, scale_k).to(q.dtype)
            v = self._quantized(v, scale_v).to(q.dtype)
        y = attention_steps(
            q, k, v,
            keys=self.keys, values=self.values, table=self.table.tensor,
            slots=layout.slot_index(q.device),
            cached_lengths=layout.cached_lengths_tensor(q.device),
        )  # fmt: skip
        return y if scale_v == 1 else y * scale_v

    def _quantized(self, x: Tensor, scale: float) -> Tensor:
        """Keys or values as they are kept; what is too large for float8 becomes its largest."""
        dtype = self.keys.dtype
        if dtype == torch.float8_e4m3fn:
            most = torch.finfo(dtype).max
            x = (x / scale).clamp(-most, most)
        return x.to(dtype)

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
