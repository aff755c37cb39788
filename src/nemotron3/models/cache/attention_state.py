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
        device = k.device
        of_slot = layout.slot_index(device)[layout.segments.ids(device)]
        at = self.table.places(of_slot, layout.positions(device))
        for pool, new, scale in ((self.keys, k, self.scales[0]), (self.values, v, self.scales[1])):
            pool.flatten(0, 1)[at] = self._quantized(new.detach(), scale)

    def extend(self, layout: SequenceLayout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the call's keys and values; returns those of the whole sequences, packed."""
        self.write(layout, k, v)
        is_narrow = self.keys.dtype != k.dtype
        if not is_narrow and not any(layout.cached_lengths):
            return k, v
        whole, device = layout.keys, k.device
        of_slot = layout.slot_index(device)[whole.ids(device)]
        at = self.table.places(of_slot, whole.positions(device))
        gathered: list[Tensor] = []
        for pool, new, scale in ((self.keys, k, self.scales[0]), (self.values, v, self.scales[1])):
            stored = pool.flatten(0, 1)[at]
            if is_narrow:
                stored = stored.to(new.dtype) * scale
            elif new.requires_grad:  # what is stored has no gradients
                starts = torch.tensor(whole.starts[:-1], device=device)
                own = starts[layout.segments.ids(device)] + layout.positions(device)
                stored = stored.index_copy(0, own, new)
            gathered.append(stored)
        return gathered[0], gathered[1]

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
