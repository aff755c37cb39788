"""The carried state of an attention layer: keys and values of every token, in pages."""

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron3.models.cache.state import LayerState, StateMemory
from nemotron3.models.layout import SequenceLayout
from nemotron3.ops.attention import attention_steps


class AttentionState(LayerState):
    """Keys and values of one attention layer, in pages that the cache assigns.

    Attention reads the stored values, so that rounded keys are the same in the call that computes
    them and in later ones. Keys and values are divided by `scales` before they are stored.
    """

    def __init__(self, memory: StateMemory, *, num_key_value_heads: int, head_dim: int) -> None:
        self.table = memory.table
        self.scales = memory.key_scales
        keys, values = (memory.page_entries(num_key_value_heads, head_dim) for _ in range(2))
        super().__init__(pages=(keys, values))

    @property
    def keys(self) -> Tensor:
        """[page, place, head, head_dim]."""
        return self.pages[0]

    @property
    def values(self) -> Tensor:
        """[page, place, head, head_dim]."""
        return self.pages[1]

    def write(self, layout: SequenceLayout, k: Tensor, v: Tensor) -> None:
        """Store the call's keys and values."""
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
        """Store the call's keys and values; returns those of the whole sequences, packed."""
        self.write(layout, k, v)
        scale_k, scale_v = self.scales
        return (
            self._gathered_kv(layout, self.keys, k, scale_k),
            self._gathered_kv(layout, self.values, v, scale_v),
        )

    def _gathered_kv(
        self, layout: SequenceLayout, pool: Tensor, new: Tensor, scale: float
    ) -> Tensor:
        """Stored keys or values of the whole sequences, packed; `new` are those of this call."""
        is_narrow = pool.dtype != new.dtype
        if not is_narrow and not any(layout.cached_lengths):
            return new
        flat, parts = pool.flatten(0, 1), []
        news = new.split(layout.segments.lengths)
        for slot, old, last in zip(layout.slots, layout.cached_lengths, news, strict=True):
            if is_narrow:
                places = self.table.positions(slot, 0, old + len(last))
                parts.append(flat[places].to(new.dtype) * scale)
            elif old and not new.requires_grad:  # one copy of a long context instead of two
                parts.append(flat[self.table.positions(slot, 0, old + len(last))])
            else:
                parts += [flat[self.table.positions(slot, 0, old)], last] if old else [last]
        return _joined(parts)

    def attend(
        self,
        layout: SequenceLayout,
        q: Float[Tensor, "tokens head head_dim"],
        k: Float[Tensor, "tokens kv_head head_dim"],
        v: Float[Tensor, "tokens kv_head head_dim"],
    ) -> Float[Tensor, "tokens head head_dim"]:
        """Store the keys and values of a step, and attend to the whole sequences."""
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
        """Keys or values in the stored dtype; for float8 they saturate."""
        dtype = self.keys.dtype
        if dtype == torch.float8_e4m3fn:
            most = torch.finfo(dtype).max
            x = (x / scale).clamp(-most, most)
        return x.to(dtype)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
