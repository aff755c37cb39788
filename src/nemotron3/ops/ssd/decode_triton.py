"""Decoding steps of the scan as a Triton kernel: the state is read once, advanced, written once.

With few tokens the time goes into reading and writing the states, so a program keeps a slice of one
head's state in registers while it goes over all k tokens of a sequence. Drafts may be rejected:
with `intermediate_states` the state after each token is written there and the pool stays unchanged,
and the caller continues from the state after the last accepted token.

    h <- exp(dt_t A) h + dt_t x_t B_t^T,    y_t = h C_t + D x_t
"""

# ruff: noqa: ANN001, ANN202
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron3.ops.kernels import require_kernel_dtypes

_STEPS = {"BLOCK_P": 16, "num_warps": 4}
"""BLOCK_P rows of a head's state per program: few, so that one sequence fills a large GPU."""


@triton.jit
def _steps_kernel(
    x, dt, A, B, C, D, ssm_states, slots, intermediate_states, y,
    stride_intermediate, stride_x_t, stride_x_h, stride_dt, stride_b_t, stride_b_g, stride_c_t,
    stride_c_g,
    heads, per_group,
    LENGTH: tl.constexpr, HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, EVERY: tl.constexpr,
    BLOCK_P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Advance BLOCK_P rows of one head's state by LENGTH tokens of one sequence."""
    segment = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = head // per_group
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, N)
    cell = p[:, None] * D_STATE + n[None, :]
    exists = (p < HEAD_DIM)[:, None] & (n < D_STATE)[None, :]
    size = HEAD_DIM * D_STATE
    slot = tl.load(slots + segment)
    if slot < 0:
        for t in range(LENGTH):
            none = tl.zeros((BLOCK_P,), y.dtype.element_ty)
            out_at = y + ((segment * LENGTH + t) * heads + head) * HEAD_DIM + p
            tl.store(out_at, none, mask=p < HEAD_DIM)
        return
    place = ssm_states + (slot * heads + head) * size + cell
    state = tl.load(place, mask=exists, other=0.0).to(tl.float32)
    rate = tl.load(A + head).to(tl.float32)
    skip = tl.load(D + head).to(tl.float32)
    for t in range(LENGTH):
        token = segment * LENGTH + t
        step = tl.load(dt + token * stride_dt + head).to(tl.float32)
        x_at = x + token * stride_x_t + head * stride_x_h
        x_ = tl.load(x_at + p, mask=p < HEAD_DIM, other=0.0).to(tl.float32)
        B_at = B + token * stride_b_t + group * stride_b_g
        B_ = tl.load(B_at + n, mask=n < D_STATE, other=0.0).to(tl.float32)
        C_at = C + token * stride_c_t + group * stride_c_g
        C_ = tl.load(C_at + n, mask=n < D_STATE, other=0.0).to(tl.float32)
        state = tl.exp(step * rate) * state + (step * x_)[:, None] * B_[None, :]
        out = tl.sum(state * C_[None, :], axis=1) + skip * x_
        tl.store(
            y + (token * heads + head) * HEAD_DIM + p, out.to(y.dtype.element_ty), mask=p < HEAD_DIM
        )
        if EVERY:
            after = (
                intermediate_states
                + segment * stride_intermediate
                + (t * heads + head) * size
                + cell
            )
            tl.store(after, state.to(intermediate_states.dtype.element_ty), mask=exists)
    if not EVERY:
        tl.store(place, state.to(ssm_states.dtype.element_ty), mask=exists)


def ssd_steps_triton(
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
    require_kernel_dtypes("ssd", x, dt, A, B, C, D, ssm_states)
    rows = len(slots)
    (_, heads, head_dim), (_, groups, d_state) = x.shape, B.shape
    x, dt, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, dt, B, C))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _steps_kernel[(rows * heads, triton.cdiv(head_dim, _STEPS["BLOCK_P"]))](
        x, dt, A.contiguous(), B, C, D.contiguous(), ssm_states, slots,
        ssm_states if intermediate_states is None else intermediate_states, y,
        0 if intermediate_states is None else intermediate_states.stride(0),
        x.stride(0), x.stride(1), dt.stride(0), B.stride(0), B.stride(1), C.stride(0), C.stride(1),
        heads, heads // groups,
        LENGTH=len(x) // rows, HEAD_DIM=head_dim, D_STATE=d_state,
        EVERY=intermediate_states is not None,
        N=triton.next_power_of_2(d_state), **_STEPS,
    )  # fmt: skip
    return y
