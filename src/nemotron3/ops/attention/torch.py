"""Attention through PyTorch's fused kernel, one call for all segments of one shape.

A stream of equal sequences, the usual training batch and the usual decoding batch, is one call. A
packed stream is one call per distinct shape, so a segment's result does not depend on the others. A
block-diagonal mask over the stream would cost the square of the stream's length.

Where a sequence has cached keys (a prompt that is prefilled in chunks), the causal mask is aligned
to the lower right: the last query sees the last key. Flash attention supports this directly;
elsewhere the mask is written out, for so many queries at a time that memory stays bounded.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F

from nemotron3.ops.backends import Kernel
from nemotron3.ops.segments import Segments

_FLASH = Kernel("nemotron3.ops.attention.torch_flash", "attend_behind_flash")
_MAX_SCORES = 1 << 28
"""Most scores of one masked call: a gigabyte in float32, if the kernel stores them."""


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, *, queries: Segments, keys: Segments
) -> Tensor:
    """Attend, grouped by shape; shapes as in `nemotron3.ops.attention.api.attention`."""
    if queries.uniform_length is not None and keys.uniform_length is not None:
        rows = len(queries)
        y = _attend(
            q.unflatten(0, (rows, -1)), k.unflatten(0, (rows, -1)), v.unflatten(0, (rows, -1))
        )
        return y.flatten(0, 1)
    same_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, shape in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        same_shape[shape].append(index)
    q_parts, k_parts, v_parts = (
        q.split(queries.lengths),
        k.split(keys.lengths),
        v.split(keys.lengths),
    )
    outputs: list[Tensor] = [q] * len(queries)
    for indices in same_shape.values():
        stacked = (
            torch.stack([parts[i] for i in indices]) for parts in (q_parts, k_parts, v_parts)
        )
        for index, output in zip(indices, _attend(*stacked), strict=True):
            outputs[index] = output
    return torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One fused call on [row, length, head, head_dim] tensors; queries are the last positions."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    is_grouped = q.shape[1] != k.shape[1]
    if 1 < n_queries < n_keys:
        y = _attend_behind(q, k, v, is_grouped=is_grouped)
    else:
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=n_queries == n_keys, enable_gqa=is_grouped
        )
    return y.transpose(1, 2)


def _attend_behind(q: Tensor, k: Tensor, v: Tensor, *, is_grouped: bool) -> Tensor:
    """Attend with several queries and more keys than queries, [row, head, length, head_dim]."""
    (rows, heads, n_queries, _), n_keys = q.shape, k.shape[2]
    if can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, is_grouped)):
        return _FLASH.loaded(q, k, v, is_grouped=is_grouped)
    block = max(1, _MAX_SCORES // (rows * heads * n_keys))
    outputs = []
    for start in range(0, n_queries, block):
        some = q[:, :, start : start + block]
        seen = n_keys - n_queries + start + some.shape[2]
        mask = torch.ones(some.shape[2], seen, dtype=torch.bool, device=q.device)
        mask = mask.tril(n_keys - n_queries + start)
        outputs.append(
            F.scaled_dot_product_attention(
                some, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, enable_gqa=is_grouped
            )
        )
    return torch.cat(outputs, dim=2)
