"""Attention through PyTorch's fused kernel, one call for all segments of one shape.

A stream of equal sequences, the usual training batch and the usual decoding batch, is one call; a
packed one is a call per distinct shape, which keeps every segment's arithmetic free of its
neighbours where a block-diagonal mask over the stream would cost the square of its whole length.
"""

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.segments import Segments


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, *, queries: Segments, keys: Segments) -> Tensor:
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
    mask = None
    if 1 < n_queries < n_keys:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
        mask = mask.tril(n_keys - n_queries)
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=n_queries == n_keys, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)
