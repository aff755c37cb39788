"""The recurrence of Mamba-2, one token at a time, as the paper writes it.

Dao & Gu, *Transformers are SSMs* (arXiv 2405.21060), section 3 and listing 1. Per head, with state
h of shape [head_dim, d_state]:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
    y_t = h_t C_t + D x_t

Heads are split evenly among groups, and all heads of a group share B and C. Run it in float64 to
judge the faster files.
"""

import torch
from torch import Tensor

from nemotron3.ops.segments import Segments


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    segments: Segments,
    initial_states: Tensor,
    chunk_size: int,  # noqa: ARG001 - the recurrence has no chunks; every backend is called alike
) -> tuple[Tensor, Tensor]:
    """Scan each segment token by token; shapes as in `nemotron3.ops.ssd.api.ssd`."""
    heads_per_group = x.shape[1] // B.shape[1]
    B = B.repeat_interleave(heads_per_group, dim=1)  # tokens head d_state
    C = C.repeat_interleave(heads_per_group, dim=1)
    outputs, final_states = [], []
    for index, length in enumerate(segments.lengths):
        start = segments.starts[index]
        h = initial_states[index]
        for t in range(start, start + length):
            decay = torch.exp(dt[t] * A)  # head
            h = decay[:, None, None] * h + torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
            outputs.append(torch.einsum("hpn,hn->hp", h, C[t]) + D[:, None] * x[t])
        final_states.append(h)
    return torch.stack(outputs), torch.stack(final_states)
