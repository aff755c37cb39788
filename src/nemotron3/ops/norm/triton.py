"""Both norms as one kernel forward and one backward, each a single pass over memory.

A norm does a handful of operations per element, so its time is that of reading and writing the
rows. Gate, square, mean and weight are applied in registers: the forward pass reads the operands
and writes the result, the backward pass reads operands and gradient and writes the gradients. The
plain norm is the gated one without a gate and with one group.

A program handles whole groups of rows, because a mean needs all of a group. In the backward pass it
goes over a span of rows and keeps the sum of the weight's gradient in registers. The programs' sums
are added in a fixed order, so that the result never depends on timing. A row's result does not
depend on the other rows of its program.
"""

# A Triton kernel takes pointers and numbers without annotations, and often many of them.
# ruff: noqa: ANN001, ANN202, PLR0913
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.kernels import contiguous_rows, require_kernel_dtypes

_TILE = 2048
"""Elements that a program holds at a time, unless one group is larger. With twice as many the gated
backward kernel would spill registers (compute capability 9.0)."""
_COLUMNS_PER_WARP = 512
_PROGRAMS = 1024
"""Programs that fill a large GPU a few times over; more would only make more partial sums."""


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis."""
    require_kernel_dtypes("rms_norm", x, weight)
    return _Norm.apply(x, None, weight, 1, eps)


def gated_group_norm_triton(
    x: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float
) -> Tensor:
    """RMS norm of x SiLU(gate) within each of `groups` equal parts of the last axis."""
    require_kernel_dtypes("gated_group_norm", x, gate, weight)
    return _Norm.apply(x, gate, weight, groups, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, groups: int, eps: float
    ) -> Tensor:
        ctx.shape = x.shape
        x, weight = _rows(x), weight.contiguous()
        gate = None if gate is None else _rows(gate)
        rows, width = x.shape
        y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        scales = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
        sizes = _sizes(width, groups, gate)
        if rows:
            _forward_kernel[(triton.cdiv(rows, sizes["BLOCK_ROWS"]), groups)](
                x, gate, weight, y, scales, rows, eps,
                x.stride(0), 0 if gate is None else gate.stride(0), width, groups, **sizes,
            )  # fmt: skip
        ctx.save_for_backward(x, gate, weight, scales)
        return y.view(ctx.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scales = ctx.saved_tensors
        grad = _rows(grad)
        (rows, width), groups = x.shape, scales.shape[1]
        sizes = _sizes(width, groups, gate)
        blocks = triton.cdiv(rows, sizes["BLOCK_ROWS"])
        span = max(1, triton.cdiv(blocks * groups, _PROGRAMS))
        spans = triton.cdiv(blocks, span)
        dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
        d_gate = None if gate is None else torch.empty_like(dx, dtype=gate.dtype)
        d_weights = torch.empty(spans, width, dtype=torch.float32, device=x.device)
        if rows:
            _backward_kernel[(spans, groups)](
                x, gate, weight, scales, grad, dx, d_gate, d_weights, rows, span,
                x.stride(0), 0 if gate is None else gate.stride(0), grad.stride(0),
                width, groups, **sizes,
            )  # fmt: skip
        d_weight = d_weights.sum(0).to(weight.dtype)
        return (
            dx.view(ctx.shape),
            None if d_gate is None else d_gate.view(ctx.shape),
            d_weight,
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    """`x` as [rows, width], without a copy where its rows are at a constant distance."""
    return contiguous_rows(x.reshape(-1, x.shape[-1]))


def _sizes(width: int, groups: int, gate: Tensor | None) -> dict[str, Any]:
    columns = triton.next_power_of_2(width // groups)
    rows = max(1, _TILE // columns)
    return {
        "HAS_GATE": gate is not None,
        "GROUP": width // groups,
        "BLOCK_ROWS": min(rows, 16),
        "BLOCK_COLUMNS": columns,
        "num_warps": min(16, max(4, columns // _COLUMNS_PER_WARP)),
    }


@triton.jit
def _forward_kernel(
    x_ptr, gate_ptr, weight_ptr, y_ptr, scales_ptr, rows, eps,
    stride_x, stride_gate, width, groups,
    HAS_GATE: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = w u r with u = x SiLU(gate) and r = (mean(u^2) + eps)^(-1/2), for one group of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1)
    within = tl.arange(0, BLOCK_COLUMNS)
    column = (group * GROUP + within)[None, :]
    mask = (row < rows)[:, None] & (within < GROUP)[None, :]
    u = tl.load(x_ptr + row[:, None] * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_GATE:
        gate = tl.load(gate_ptr + row[:, None] * stride_gate + column, mask=mask, other=0.0)
        gate = gate.to(tl.float32)
        u *= gate * tl.sigmoid(gate)
    scale = tl.rsqrt(tl.sum(u * u, axis=1) / GROUP + eps)
    tl.store(scales_ptr + row * groups + group, scale, mask=row < rows)
    weight = tl.load(weight_ptr + column, mask=(within < GROUP)[None, :], other=0.0)
    y = weight.to(tl.float32) * (u * scale[:, None])
    tl.store(y_ptr + row[:, None] * width + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr, gate_ptr, weight_ptr, scales_ptr, grad_ptr, dx_ptr, d_gate_ptr, d_weights_ptr,
    rows, span, stride_x, stride_gate, stride_grad, width, groups,
    HAS_GATE: tl.constexpr, GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """With n = u r and g = w dy: du = r (g - n mean(g n)), dw = sum of dy n over `span` blocks.

    dx = du SiLU(gate) and dgate = du x s (1 + gate (1 - s)), s = sigmoid(gate).
    """
    group = tl.program_id(1)
    within = tl.arange(0, BLOCK_COLUMNS)
    column = (group * GROUP + within)[None, :]
    inside = (within < GROUP)[None, :]
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * span * BLOCK_ROWS
    for block in range(span):
        row = first + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & inside
        at = row[:, None]
        x = tl.load(x_ptr + at * stride_x + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + at * stride_grad + column, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + row * groups + group, mask=row < rows, other=0.0)[:, None]
        if HAS_GATE:
            gate = tl.load(gate_ptr + at * stride_gate + column, mask=mask, other=0.0)
            gate = gate.to(tl.float32)
            s = tl.sigmoid(gate)
            factor = gate * s
            n = x * factor * scale
        else:
            n = x * scale
        g = weight * grad
        du = scale * (g - n * (tl.sum(g * n, axis=1) / GROUP)[:, None])
        d_weight += grad * n
        if HAS_GATE:
            d_gate = du * x * s * (1 + gate * (1 - s))
            d_gate = d_gate.to(d_gate_ptr.dtype.element_ty)
            tl.store(d_gate_ptr + at * width + column, d_gate, mask=mask)
            du *= factor
        tl.store(dx_ptr + at * width + column, du.to(dx_ptr.dtype.element_ty), mask=mask)
    row = tl.program_id(0).to(tl.int64)
    partial = tl.sum(d_weight, axis=0)[None, :]
    tl.store(d_weights_ptr + row * width + column, partial, mask=inside)
