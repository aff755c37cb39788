"""The scan for a handful of new tokens: decoding, and the check of drafted tokens.

Few tokens against a large carried state are bound by the memory that the state takes, so the plain
recurrence over time, vectorised over segments and heads, is the right algorithm here. Segments must
all have the same small length, as they do when every request advances by k tokens.
"""

import torch
from torch import Tensor

from nemotron3.ops.segments import Segments


def ssd_steps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    segments: Segments,
    initial_states: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance every segment by its few tokens; shapes as in `nemotron3.ops.ssd.api.ssd`."""
    rows, length = len(segments), segments.uniform_length
    assert length is not None, "decoding steps need segments of one length"
    groups, per_group = B.shape[1], x.shape[1] // B.shape[1]
    x_, dt_ = x.unflatten(0, (rows, length)), dt.unflatten(0, (rows, length))
    B_, C_ = B.unflatten(0, (rows, length)), C.unflatten(0, (rows, length))
    state = initial_states.unflatten(1, (groups, per_group))  # row g r p n
    outputs = []
    for t in range(length):
        decay = torch.exp(dt_[:, t] * A).unflatten(1, (groups, per_group))
        xdt = (x_[:, t] * dt_[:, t].unsqueeze(-1)).unflatten(1, (groups, per_group))
        added = xdt.unsqueeze(-1) * B_[:, t, :, None, None, :]
        state = state * decay[..., None, None] + added
        y = state.flatten(2, 3) @ C_[:, t].unsqueeze(-1)  # row g (r p) 1
        outputs.append(y.reshape(rows, -1, x.shape[2]))
    y = torch.stack(outputs, dim=1).flatten(0, 1) + D.unsqueeze(-1) * x
    return y, state.flatten(1, 2)
