"""The scan as Triton kernels: three passes forward, three backward, one kernel for decoding steps.

The mathematics of `ops/ssd/torch.py` (Dao & Gu, *Transformers are SSMs*, arXiv 2405.21060,
section 6), arranged for a processor whose memory is slow and whose matrix units are fast. Within a
chunk, with T the running sum of dt A, E its last value and h the state before the chunk:

    y_t    = sum_{s<=t} (C_t . B_s) exp(T_t - T_s) dt_s x_s  +  exp(T_t) h C_t  +  D x_t
    h_next = exp(E) h  +  sum_s exp(E - T_s) dt_s x_s B_s^T

1. `_decay_kernel` writes T and dt, with time as the innermost axis.
2. `_states_kernel` loops over a segment's chunks, with the state in registers, and writes h before
   each. Fusing a chunk's contribution with this loop moves a quarter of the bytes of two kernels.
3. `_scan_kernel` handles a chunk of a group: it computes C B^T once and loops over the heads.

The backward pass recomputes 1 and 2 instead of keeping their results. The gradient of the states
obeys the same recurrence with time reversed, so kernel 2 runs again in reverse; then
`_scan_backward_kernel` computes all gradients of a chunk of a group. A program sums over its
group's heads in order and no two programs write one number, so results repeat bit for bit.

A chunk is a tile: its length is a power of two, it never contains two segments, and its unused rows
are masked rather than padded. Operands of products are rounded to the dtype of `x`; sums and
carried states are float32, and float64 is refused. Tiles are shorter for float32 operands, to fit
in shared memory.
"""

# ruff: noqa: ANN001, ANN202
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.kernels import INTERPRETED, require_kernel_dtypes
from nemotron3.ops.segments import Segments

_INTERPRETED = tl.constexpr(INTERPRETED)
_NARROW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# `python -m benchmarks.gpu --tune` searches these sizes.
_FORWARD_TILE, _BACKWARD_TILE = 128, 64  # tokens of a chunk; half for float32
_STATES = {"num_warps": 4, "num_stages": 3}
_SCAN = {"num_warps": 8, "num_stages": 2}
_SCAN_BACKWARD = {"num_warps": 8, "num_stages": 2}
_ENOUGH_PROGRAMS = 264
"""Twice the multiprocessors of an H100: with fewer programs, the work is split further."""


@triton.jit
def _product(a, b, NARROW: tl.constexpr):
    """The matrix product, summed in float32, of operands rounded to the dtype of the inputs.

    Float32 operands are split into three TF32 products, which are exact to about 1e-6.
    """
    a = a.to(NARROW)
    b = b.to(NARROW)
    if _INTERPRETED:  # the interpreter's dot misreads bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _decay_kernel(
    dt, A, chunks, total, dt_by_head,
    stride_dt, tokens, heads,
    L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """total[head, t] = sum over s <= t of the chunk of dt_s A, and dt as [head, t]."""
    start = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    length = tl.load(chunks + 2 * tl.program_id(0) + 1)
    t = tl.arange(0, L)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = (t < length)[:, None] & (head < heads)[None, :]
    token = start + t
    step = tl.load(dt + token[:, None] * stride_dt + head[None, :], mask=inside, other=0.0)
    step = step.to(tl.float32)
    rate = tl.load(A + head, mask=head < heads, other=0.0).to(tl.float32)
    decay = step * rate[None, :]
    # Below -104 the exponential is zero; larger magnitudes would absorb the small steps in the sum.
    decay = tl.where(decay < -104.0, -104.0, decay)
    running = tl.cumsum(decay, axis=0)
    where = head.to(tl.int64)[None, :] * tokens + token[:, None]
    tl.store(total + where, running, mask=inside)
    tl.store(dt_by_head + where, step, mask=inside)


@triton.jit
def _states_kernel(
    a, b, total, dt, bounds, initial, states, final,
    stride_a, stride_b, tokens, heads, per_group,
    HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, REVERSE: tl.constexpr, NARROW: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Carry a state over the chunks of one segment for one head, and write it before each chunk.

    Forward:   h <- exp(E) h + sum_s exp(E - T_s) dt_s x_s B_s^T     (a = x, b = B)
    In reverse: g <- exp(E) g + sum_t exp(T_t) dy_t C_t^T            (a = dy, b = C)
    """
    segment = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    begin = tl.load(bounds + 3 * segment).to(tl.int64)
    end = tl.load(bounds + 3 * segment + 1).to(tl.int64)
    first = tl.load(bounds + 3 * segment + 2).to(tl.int64)
    t = tl.arange(0, L)
    p = tl.arange(0, P)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cell = p[:, None] * D_STATE + n[None, :]
    exists = (p < HEAD_DIM)[:, None] & (n < D_STATE)[None, :]
    whole = (segment * heads + head) * HEAD_DIM * D_STATE
    a += head * HEAD_DIM
    b += head // per_group * D_STATE
    total += head * tokens
    dt += head * tokens

    carry = tl.load(initial + whole + cell, mask=exists, other=0.0).to(tl.float32)
    count = tl.cdiv(end - begin, L)
    for i in range(count):
        c = i
        if REVERSE:
            c = count - 1 - i
        start = begin + c * L
        inside = t < end - start
        running = tl.load(total + start + t, mask=inside, other=0.0)
        last = tl.load(total + tl.minimum(start + L, end) - 1)
        if REVERSE:
            weight = tl.exp(running)
        else:
            weight = tl.exp(last - running) * tl.load(dt + start + t, mask=inside, other=0.0)
        a_ = tl.load(
            a + start * stride_a + t[None, :] * stride_a + p[:, None],
            mask=inside[None, :] & (p < HEAD_DIM)[:, None],
            other=0.0,
        )  # p t
        b_ = tl.load(
            b + start * stride_b + t[:, None] * stride_b + n[None, :],
            mask=inside[:, None] & (n < D_STATE)[None, :],
            other=0.0,
        )  # t n
        before = ((first + c) * heads + head) * HEAD_DIM * D_STATE
        tl.store(states + before + cell, carry.to(NARROW), mask=exists)
        carry = carry * tl.exp(last) + _product(a_.to(tl.float32) * weight[None, :], b_, NARROW)
    tl.store(final + whole + cell, carry, mask=exists)


@triton.jit
def _scan_kernel(
    x, B, C, D, total, dt, chunks, states, y,
    stride_x, stride_b, stride_c, tokens, heads, per_group,
    HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, HEADS: tl.constexpr, NARROW: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """y = (C B^T * decay * dt) x + exp(T) C h^T + D x, for HEADS heads of one chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    head = tl.program_id(1).to(tl.int64) * HEADS
    group = head // per_group
    t = tl.arange(0, L)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    inside = t < length
    C_ = tl.load(
        C + start * stride_c + group * D_STATE + t[:, None] * stride_c + n[None, :],
        mask=inside[:, None] & (n < D_STATE)[None, :],
        other=0.0,
    )  # t n
    B_ = tl.load(
        B + start * stride_b + group * D_STATE + t[None, :] * stride_b + n[:, None],
        mask=inside[None, :] & (n < D_STATE)[:, None],
        other=0.0,
    )  # n s
    scores = _product(C_, B_, NARROW)  # t s
    sees = (t[:, None] >= t[None, :]) & inside[:, None]
    tile = inside[:, None] & (p < HEAD_DIM)[None, :]

    for h in range(head, head + HEADS):
        by_head = h * tokens + start + t
        running = tl.load(total + by_head, mask=inside, other=0.0)
        step = tl.load(dt + by_head, mask=inside, other=0.0)
        x_at = x + start * stride_x + h * HEAD_DIM
        x_ = tl.load(x_at + t[:, None] * stride_x + p[None, :], mask=tile, other=0.0)  # s p
        state = tl.load(
            states + (chunk * heads + h) * HEAD_DIM * D_STATE + p[None, :] * D_STATE + n[:, None],
            mask=(p < HEAD_DIM)[None, :] & (n < D_STATE)[:, None],
            other=0.0,
        )  # n p
        decay = tl.exp(tl.where(sees, running[:, None] - running[None, :], -float("inf")))
        out = _product(C_, state, NARROW) * tl.exp(running)[:, None]
        out += _product(scores * decay * step[None, :], x_, NARROW)
        out += tl.load(D + h).to(tl.float32) * x_.to(tl.float32)
        y_at = y + (start * heads + h) * HEAD_DIM + t[:, None] * heads * HEAD_DIM + p[None, :]
        tl.store(y_at, out.to(y.dtype.element_ty), mask=tile)


@triton.jit
def _scan_backward_kernel(  # noqa: PLR0915
    x, B, C, D, A, dy, total, dt, chunks, states, gradients,
    dx, ddt, dB, dC, dA, dD,
    stride_x, stride_b, stride_c, stride_dy, tokens, heads, per_group,
    HEAD_DIM: tl.constexpr, D_STATE: tl.constexpr, NARROW: tl.constexpr,
    L: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of one group, given h before it and the gradient g of h after it.

    With S = C B^T, M = decay from s to t, and sums over the group's heads for dB and dC:

        u_s   = sum_{t>=s} S_ts M_ts dy_t  +  exp(E - T_s) g B_s          dx = D dy + dt u
        dS_ts = sum_heads M_ts dt_s (dy_t . x_s)
        dC    = dS B    + sum_heads exp(T) dy h                            dB likewise, dS^T C
        d(dt A)_k = sum_{s<k<=t} of M_ts S_ts dt_s (dy_t . x_s)            pairs around k
                  + sum_{t>=k} exp(T_t) dy_t . h C_t                       h, read from k on
                  + sum_{s<k} exp(E - T_s) dt_s x_s . g B_s                before k, carried out
                  + exp(E) <g, h>                                          h, carried out
        ddt   = x . u + A d(dt A),   dA = sum_k dt_k d(dt A)_k,   dD = sum_t dy_t . x_t
    """
    chunk = tl.program_id(0).to(tl.int64)
    start = tl.load(chunks + 2 * chunk).to(tl.int64)
    length = tl.load(chunks + 2 * chunk + 1)
    group = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, L)
    p = tl.arange(0, P)
    n = tl.arange(0, N)
    inside = t < length
    tile = inside[:, None] & (p < HEAD_DIM)[None, :]
    wide = inside[:, None] & (n < D_STATE)[None, :]
    cell = p[:, None] * D_STATE + n[None, :]
    exists = (p < HEAD_DIM)[:, None] & (n < D_STATE)[None, :]
    n_16 = tl.arange(0, 16)
    cell_16 = p[:, None] * D_STATE + n_16[None, :]
    exists_16 = (p < HEAD_DIM)[:, None]
    B += start * stride_b + group * D_STATE
    C += start * stride_c + group * D_STATE
    B_ = tl.load(B + t[:, None] * stride_b + n[None, :], mask=wide, other=0.0)  # s n
    C_ = tl.load(C + t[:, None] * stride_c + n[None, :], mask=wide, other=0.0)  # t n
    scores = _product(C_, tl.trans(B_), NARROW)  # t s
    sees = (t[:, None] >= t[None, :]) & inside[:, None]
    earlier = t[:, None] > t[None, :]
    dscores = tl.zeros((L, L), dtype=tl.float32)

    for h in range(group * per_group, group * per_group + per_group):
        by_head = h * tokens + start
        running = tl.load(total + by_head + t, mask=inside, other=0.0)
        last = tl.load(total + by_head + length - 1)
        step = tl.load(dt + by_head + t, mask=inside, other=0.0)
        x_at = x + start * stride_x + h * HEAD_DIM
        x_ = tl.load(x_at + t[:, None] * stride_x + p[None, :], mask=tile, other=0.0)  # s p
        dy_at = dy + start * stride_dy + h * HEAD_DIM
        dy_ = tl.load(dy_at + t[:, None] * stride_dy + p[None, :], mask=tile, other=0.0)  # t p
        whole = (chunk * heads + h) * HEAD_DIM * D_STATE
        state = tl.load(states + whole + cell, mask=exists, other=0.0)  # p n
        gradient = tl.load(gradients + whole + cell, mask=exists, other=0.0)  # p n
        from_start = tl.exp(running)
        to_end = tl.exp(last - running)
        decay = tl.exp(tl.where(sees, running[:, None] - running[None, :], -float("inf")))

        carried = _product(B_, tl.trans(gradient), NARROW) * to_end[:, None]  # s p
        u = _product(tl.trans(scores * decay), dy_, NARROW) + carried
        wide_x = x_.to(tl.float32)
        wide_dy = dy_.to(tl.float32)
        dx_ = tl.load(D + h).to(tl.float32) * wide_dy + step[:, None] * u
        dx_at = dx + (start * heads + h) * HEAD_DIM + t[:, None] * heads * HEAD_DIM + p[None, :]
        tl.store(dx_at, dx_.to(dx.dtype.element_ty), mask=tile)
        tl.store(dD + chunk * heads + h, tl.sum(tl.sum(wide_dy * wide_x, axis=1), axis=0))

        pairs = _product(dy_, tl.trans(x_), NARROW) * decay * step[None, :]  # t s
        dscores += pairs
        pairs = tl.where(earlier, pairs * scores, 0.0)
        out = step * tl.sum(wide_x * carried, axis=1)
        later = tl.sum(pairs, axis=1) - tl.sum(pairs, axis=0)
        later += from_start * tl.sum(wide_dy * _product(C_, tl.trans(state), NARROW), axis=1)
        kept = tl.zeros((P,), dtype=tl.float32)
        for some in tl.static_range(0, N, 16):  # a whole tile would not fit in registers
            piece = cell_16 + some
            here = exists_16 & (some + n_16 < D_STATE)[None, :]
            old = tl.load(states + whole + piece, mask=here, other=0.0).to(tl.float32)
            new = tl.load(gradients + whole + piece, mask=here, other=0.0).to(tl.float32)
            kept += tl.sum(old * new, axis=1)
        # Running sums, the first of them from the end.
        slope = tl.cumsum(later, axis=0, reverse=True) + tl.cumsum(out, axis=0) - out
        slope += tl.exp(last) * tl.sum(kept, axis=0)
        ddt_ = tl.sum(wide_x * u, axis=1) + tl.load(A + h).to(tl.float32) * slope
        tl.store(ddt + by_head + t, ddt_, mask=inside)
        tl.store(dA + chunk * heads + h, tl.sum(step * slope, axis=0))

    # A second loop, because the sums of both loops would not fit in registers at once.
    dC_ = _product(dscores, B_, NARROW)
    dB_ = _product(tl.trans(dscores), C_, NARROW)
    for h in range(group * per_group, group * per_group + per_group):
        by_head = h * tokens + start
        running = tl.load(total + by_head + t, mask=inside, other=0.0)
        last = tl.load(total + by_head + length - 1)
        step = tl.load(dt + by_head + t, mask=inside, other=0.0)
        whole = (chunk * heads + h) * HEAD_DIM * D_STATE
        dy_at = dy + start * stride_dy + h * HEAD_DIM
        dy_ = tl.load(dy_at + t[:, None] * stride_dy + p[None, :], mask=tile, other=0.0)
        dy_ = dy_.to(tl.float32) * tl.exp(running)[:, None]
        state = tl.load(states + whole + cell, mask=exists, other=0.0)
        dC_ += _product(dy_, state, NARROW)
        x_at = x + start * stride_x + h * HEAD_DIM
        x_ = tl.load(x_at + t[:, None] * stride_x + p[None, :], mask=tile, other=0.0)
        x_ = x_.to(tl.float32) * (step * tl.exp(last - running))[:, None]
        gradient = tl.load(gradients + whole + cell, mask=exists, other=0.0)
        dB_ += _product(x_, gradient, NARROW)
    groups = heads // per_group
    own = (start * groups + group) * D_STATE
    cell = t[:, None] * groups * D_STATE + n[None, :]
    tl.store(dC + own + cell, dC_.to(dC.dtype.element_ty), mask=wide)
    tl.store(dB + own + cell, dB_.to(dB.dtype.element_ty), mask=wide)


class _Plan(NamedTuple):
    """How a stream is cut into tiles: tables on the device, int32."""

    L: int
    count: int
    chunks: Tensor  # first token and length of each chunk
    bounds: Tensor  # first token, end and first chunk of each segment


@lru_cache(maxsize=64)
def _plan(segments: Segments, chunk_size: int, device: torch.device) -> _Plan:
    L = max(16, int(triton.next_power_of_2(min(chunk_size, segments.max_length))))
    chunks: list[tuple[int, int]] = []
    bounds: list[tuple[int, int, int]] = []
    for start, length in zip(segments.starts, segments.lengths, strict=False):
        end = start + length
        bounds.append((start, end, len(chunks)))
        chunks += [(i, min(L, end - i)) for i in range(start, end, L)]
    return _Plan(
        L,
        len(chunks),
        torch.tensor(chunks, dtype=torch.int32).to(device),
        torch.tensor(bounds, dtype=torch.int32).to(device),
    )


def _tile(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def _rows(t: Tensor) -> Tensor:
    """`t` in a layout with a free token stride only, so a slice of a projection is not copied."""
    dense = t.stride(-1) == 1 and (t.dim() == 2 or t.stride(1) == t.shape[2])
    return t if dense else t.contiguous()


def _decays(plan: _Plan, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads = dt.shape
    total, dt_by_head = (dt.new_empty(heads, tokens, dtype=torch.float32) for _ in range(2))
    grid = (plan.count, triton.cdiv(heads, 16))
    _decay_kernel[grid](
        dt, A, plan.chunks, total, dt_by_head, dt.stride(0), tokens, heads, L=plan.L, BLOCK_H=16
    )
    return total, dt_by_head


def _states(
    plan: _Plan, a: Tensor, b: Tensor, decays: tuple[Tensor, Tensor], initial: Tensor,
    *, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state before each chunk, in the operands' dtype, and the final ones, in float32."""
    (tokens, heads, head_dim), (_, groups, d_state) = a.shape, b.shape
    states = a.new_empty(plan.count, heads, head_dim, d_state)
    final = torch.empty_like(initial, dtype=torch.float32)
    rows, block_n = len(plan.bounds) * heads, _tile(d_state)
    while block_n > 32 and rows * triton.cdiv(d_state, block_n) < _ENOUGH_PROGRAMS:
        block_n //= 2
    _states_kernel[(rows, triton.cdiv(d_state, block_n))](
        a, b, *decays, plan.bounds, initial, states, final,
        a.stride(0), b.stride(0), tokens, heads, heads // groups,
        HEAD_DIM=head_dim, D_STATE=d_state, REVERSE=reverse, NARROW=_NARROW[a.dtype],
        L=plan.L, P=_tile(head_dim), BLOCK_N=block_n, **_STATES,
    )  # fmt: skip
    return states, final


def _scan(
    plan: _Plan, x: Tensor, B: Tensor, C: Tensor, D: Tensor,
    decays: tuple[Tensor, Tensor], states: Tensor,
) -> Tensor:  # fmt: skip
    (tokens, heads, head_dim), (_, groups, d_state) = x.shape, B.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # A shorter chunk needs fewer warps.
    options = _SCAN | {"num_warps": min(_SCAN["num_warps"], max(4, plan.L // 16))}
    per_program = heads // groups
    while per_program % 2 == 0 and plan.count * heads // per_program < _ENOUGH_PROGRAMS:
        per_program //= 2
    _scan_kernel[(plan.count, heads // per_program)](
        x, B, C, D, *decays, plan.chunks, states, y,
        x.stride(0), B.stride(0), C.stride(0), tokens, heads, heads // groups,
        HEAD_DIM=head_dim, D_STATE=d_state, HEADS=per_program, NARROW=_NARROW[x.dtype],
        L=plan.L, P=_tile(head_dim), N=_tile(d_state), **options,
    )  # fmt: skip
    return y


class _Scan(torch.autograd.Function):
    """The scan and its gradient; keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, D, initial, segments, chunk_size = operands
        share = 2 if x.dtype == torch.float32 else 1
        plan = _plan(segments, min(chunk_size, _FORWARD_TILE // share), x.device)
        decays = _decays(plan, dt, A)
        states, final = _states(plan, x, B, decays, initial, reverse=False)
        ctx.save_for_backward(x, dt, A, B, C, D, initial)
        ctx.cut = segments, min(chunk_size, _BACKWARD_TILE // share)
        return _scan(plan, x, B, C, D, decays, states), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, initial = ctx.saved_tensors
        (tokens, heads, head_dim), (_, groups, d_state) = x.shape, B.shape
        dy, dfinal = _rows(dy), dfinal.contiguous()
        plan = _plan(*ctx.cut, x.device)
        decays = _decays(plan, dt, A)
        states, _ = _states(plan, x, B, decays, initial, reverse=False)
        gradients, dinitial = _states(plan, dy, C, decays, dfinal, reverse=True)
        dx, dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, B, C))
        ddt = torch.empty(heads, tokens, dtype=torch.float32, device=x.device)
        dA, dD = (ddt.new_empty(plan.count, heads) for _ in range(2))
        _scan_backward_kernel[(plan.count, groups)](
            x, B, C, D, A, dy, *decays, plan.chunks, states, gradients,
            dx, ddt, dB, dC, dA, dD,
            x.stride(0), B.stride(0), C.stride(0), dy.stride(0), tokens, heads, heads // groups,
            HEAD_DIM=head_dim, D_STATE=d_state, NARROW=_NARROW[x.dtype],
            L=plan.L, P=_tile(head_dim), N=_tile(d_state), **_SCAN_BACKWARD,
        )  # fmt: skip
        dA, dD = dA.sum(0).to(A.dtype), dD.sum(0).to(D.dtype)
        return dx, ddt.t().to(dt.dtype), dA, dB, dC, dD, dinitial.to(initial.dtype), None, None


def ssd_triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    segments: Segments,
    initial_states: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scan each segment in tiles; shapes as in `nemotron3.ops.ssd.api.ssd`.

    `chunk_size` is an upper bound and rounded up to a power of two; the kernels limit it further.
    `x`, `B`, `C` and `y` have the same dtype; final states are float32.
    """
    require_kernel_dtypes("ssd", x, dt, A, B, C, D, initial_states)
    x, B, C = (_rows(t) for t in (x, B.to(x.dtype), C.to(x.dtype)))
    initial = initial_states.contiguous()
    return _Scan.apply(
        x, _rows(dt), A.contiguous(), B, C, D.contiguous(), initial, segments, chunk_size
    )
