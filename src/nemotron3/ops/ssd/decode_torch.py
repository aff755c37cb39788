"""The scan for a few tokens of each sequence: decoding, and the verification of drafts.

With few tokens the time goes into reading and writing the states, so the plain recurrence over
time, vectorised over sequences and heads, is the right algorithm.
"""

import torch
from torch import Tensor


def ssd_steps_torch(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    ssm_states: Tensor,
    slots: Tensor,
    *,
    intermediate_states: Tensor | None,
) -> Tensor:
    """Shapes as in `nemotron3.ops.ssd.api.ssd_steps`."""
    wide, rows = dt.dtype, len(slots)
    groups, per_group = B.shape[1], x.shape[1] // B.shape[1]
    x_, dt_, B_, C_ = (t.unflatten(0, (rows, -1)).to(wide) for t in (x, dt, B, C))
    state = ssm_states[slots].to(wide).unflatten(1, (groups, per_group))  # row g r p n
    outputs = []
    for t in range(x_.shape[1]):
        decay = torch.exp(dt_[:, t] * A).unflatten(1, (groups, per_group))
        xdt = (x_[:, t] * dt_[:, t].unsqueeze(-1)).unflatten(1, (groups, per_group))
        added = xdt.unsqueeze(-1) * B_[:, t, :, None, None, :]
        state = state * decay[..., None, None] + added
        y = state.flatten(2, 3) @ C_[:, t].unsqueeze(-1)  # row g (r p) 1
        outputs.append(y.reshape(rows, -1, x.shape[2]))
        if intermediate_states is not None:
            intermediate_states[:, t] = state.flatten(1, 2)
    if intermediate_states is None:
        ssm_states[slots] = state.flatten(1, 2).to(ssm_states.dtype)
    return (torch.stack(outputs, dim=1).flatten(0, 1) + D.unsqueeze(-1) * x).to(x.dtype)
