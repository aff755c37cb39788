"""Causal grouped-query attention, written out per segment.

softmax(q k^T / sqrt(head_dim)) v, where a query sees the keys up to its own position. With a cache
there are more keys than queries, and the queries are the last of their sequence. Vaswani et al.
(arXiv 1706.03762) section 3.2; groups of query heads share keys as in Ainslie et al. (arXiv
2305.13245).
"""

import torch
from torch import Tensor

from nemotron3.ops.segments import Segments


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, queries: Segments, keys: Segments
) -> Tensor:
    """Attend segment by segment; shapes as in `nemotron3.ops.attention.api.attention`."""
    per_group = q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5
    outputs = []
    parts = zip(q.split(queries.lengths), k.split(keys.lengths), v.split(keys.lengths), strict=True)
    for q_, k_, v_ in parts:
        k_, v_ = (t.repeat_interleave(per_group, dim=1) for t in (k_, v_))
        scores = torch.einsum("qhd,khd->hqk", q_, k_) * scale
        future = torch.ones(len(q_), len(k_), dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(future.triu(len(k_) - len(q_) + 1), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_))
    return torch.cat(outputs)
