"""Attention of a decoding step over paged keys and values, masked to each sequence's length."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_steps_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    slots: Tensor,
    cached_lengths: Tensor,
) -> Tensor:
    """Shapes as in `nemotron3.ops.attention.api.attention_steps`."""
    rows, page_size = len(slots), keys.shape[1]
    steps = len(q) // rows
    positions = cached_lengths.unsqueeze(1) + torch.arange(steps, device=q.device)  # row step
    pages = table[slots]  # row place
    where = pages.gather(1, positions // page_size), positions % page_size
    keys.index_put_(where, k.unflatten(0, (rows, steps)).to(keys.dtype))
    values.index_put_(where, v.unflatten(0, (rows, steps)).to(values.dtype))
    used = pages[:, : int(positions.max()) // page_size + 1]
    seen = torch.arange(used.shape[1] * page_size, device=q.device) <= positions.unsqueeze(-1)
    y = F.scaled_dot_product_attention(
        q.unflatten(0, (rows, steps)).transpose(1, 2),
        keys[used].flatten(1, 2).transpose(1, 2).to(q.dtype),
        values[used].flatten(1, 2).transpose(1, 2).to(q.dtype),
        attn_mask=seen.unsqueeze(1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.transpose(1, 2).flatten(0, 1)
