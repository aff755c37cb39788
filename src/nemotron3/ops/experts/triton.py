"""Routed experts as grouped products fused with the gather, the activation and the router's weight.

Rows are sorted by expert without moving them: the first product reads each row of `x` through its
index, and a table of tiles, computed on the device, gives every program its expert and its rows. A
block that does not fill its last tile is masked, not padded, and the host never waits.

* Forward: `up x`, then relu(h)^2 times the router's weight while the tile is in registers, then
  `down`. With the weight in the activation, the backward pass does not need the output of `down`.
* Backward: one product computes the activation's gradient, and its epilogue the rest while the tile
  is in registers: the gradient of h, the weighted activation again (so that it is not stored), and
  each row's part of the router weight's gradient.
* An expert's weight gradients are one product over its rows, summed by one program per tile.
* A token's k results are gathered and added in the order of its slots.

So no number is written by two programs and no sum depends on timing. Tile sizes depend on the dtype
and not on the shape, so a token's result depends on its own row only. Decoding has a second tile
size, for so few rows that reading the experts' matrices takes all the time: short, narrow tiles,
enough of them to keep the memory busy. SwiGLU uses the same products, with its activation between
them in PyTorch.
"""

# A Triton kernel takes pointers and numbers without annotations, and often many of them.
# ruff: noqa: ANN001, ANN202, PLR0913
# pyright: reportOperatorIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.experts.activations import Activation, activate, activation_backward
from nemotron3.ops.kernels import INTERPRETED, contiguous_rows, require_kernel_dtypes

jit: Any = triton.jit
_COMBINE_BLOCK = 1024

# Epilogues: what a product does with a tile while it is in registers.
_PLAIN, _ACTIVATE, _ACTIVATE_BACKWARD = 0, 1, 2


class _Blocks(NamedTuple):
    """Tile sizes of a product: rows, columns and the inner dimension."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


class _Plan(NamedTuple):
    """Rows sorted by expert, and the tiles that cover them."""

    token: Tensor
    """Token of each sorted row, [row]."""
    slot: Tensor
    """Sorted row of each (token, choice), [token * choice]."""
    order: Tensor
    """(token, choice) of each sorted row, [row]."""
    bounds: Tensor
    """Where each expert's rows begin, [expert + 1]."""
    tiles: Tensor
    """Expert, first row and end of each tile, [3, tile]; unused tiles have no rows."""


def routed_experts_triton(
    x: Tensor, indices: Tensor, weights: Tensor, up: Tensor, down: Tensor, activation: Activation
) -> Tensor:
    """Apply all experts with grouped products; shapes as in
    `nemotron3.ops.experts.api.routed_experts`."""
    require_kernel_dtypes("experts", x, up, down)
    if not torch.is_grad_enabled():
        x, weights, up, down = (t.detach() for t in (x, weights, up, down))
    blocks = _product_blocks(x.dtype, indices.numel(), up.shape[0])
    plan = _sort_by_expert(indices, up.shape[0], blocks.rows)
    return _RoutedExperts.apply(x, weights, up, down, plan, activation)


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        plan: _Plan,
        activation: Activation,
    ) -> Tensor:
        x = contiguous_rows(x)
        row_weights = weights.flatten()[plan.order]
        rows, up_t = len(plan.order), up.transpose(1, 2)
        h = x.new_empty(rows, up.shape[1])
        if activation == "relu2":
            a = torch.empty_like(h)
            keeps = any(ctx.needs_input_grad)
            _product(
                x, up_t, h, plan, gather=True, epilogue=_ACTIVATE,
                fused={"weights": row_weights, "activated": a, "KEEP_PRODUCT": keeps},
            )  # fmt: skip
        else:
            _product(x, up_t, h, plan, gather=True)
            a = activate(h, activation) * row_weights.unsqueeze(1)
        y = x.new_empty(rows, x.shape[1])
        _product(a, down.transpose(1, 2), y, plan)
        ctx.save_for_backward(x, row_weights, up, down, h, *plan)
        ctx.choices, ctx.activation = weights.shape, activation
        return _combine(y, plan.slot, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, row_weights, up, down, h, *rest = ctx.saved_tensors
        plan, grad = _Plan(*rest), contiguous_rows(grad)
        _, _, needs_up, needs_down, *_ = ctx.needs_input_grad
        dh = torch.empty_like(h)
        if ctx.activation == "relu2":
            a = torch.empty_like(h)
            blocks = _product_blocks(x.dtype, len(h), len(down))
            parts = int(triton.cdiv(h.shape[1], blocks.columns))
            d_row_weights = torch.empty(len(h), parts, dtype=torch.float32, device=h.device)
            _product(
                grad, down, dh, plan, gather=True, epilogue=_ACTIVATE_BACKWARD,
                fused={"weights": row_weights, "activated": a, "h": h, "partial": d_row_weights},
            )  # fmt: skip
        else:
            column = row_weights.unsqueeze(1)
            da = h.new_empty(len(h), down.shape[2])
            _product(grad, down, da, plan, gather=True)
            a = activate(h, ctx.activation)
            d_row_weights = da.float() * a
            a = a * column
            dh = activation_backward(h, da * column, ctx.activation)
        d_weights = d_row_weights.sum(1)[plan.slot].to(x.dtype).view(ctx.choices)
        d_down = d_up = None
        if needs_down:
            d_down = torch.empty_like(down, memory_format=torch.contiguous_format)
            _weight_gradient(grad, a, d_down, plan, gather_left=True)
        if needs_up:
            d_up = torch.empty_like(up, memory_format=torch.contiguous_format)
            _weight_gradient(dh, x, d_up, plan, gather_right=True)
        d_rows = x.new_empty(len(h), x.shape[1])
        _product(dh, up, d_rows, plan)
        return _combine(d_rows, plan.slot, len(x)), d_weights, d_up, d_down, None, None


# `python -m benchmarks.gpu --tune` searches these sizes, for half precision.
_PRODUCT = _Blocks(128, 128, 64, 8, 3)
_WEIGHT_GRADIENT = _Blocks(128, 128, 64, 8, 3)
_FEW_ROWS = _Blocks(16, 64, 128, 4, 4)
_MOST_OF_FEW = 8
"""Average rows per expert up to which `_FEW_ROWS` is used: few experts then need a second tile."""


def _blocks(dtype: torch.dtype, half: _Blocks) -> _Blocks:
    if INTERPRETED:
        return _Blocks(16, 16, 16, 4, 3)
    return _Blocks(64, 64, 32, 4, 3) if dtype == torch.float32 else half


def _product_blocks(dtype: torch.dtype, rows: int, experts: int) -> _Blocks:
    is_half = dtype != torch.float32
    return _blocks(dtype, _FEW_ROWS if is_half and rows <= _MOST_OF_FEW * experts else _PRODUCT)


def _sort_by_expert(indices: Tensor, num_experts: int, block: int) -> _Plan:
    """Sort (token, choice) pairs by expert and cover each expert's rows with tiles of `block`.

    The number of tiles is bounded from the sizes alone, so nothing is read back from the device:
    each expert with rows has at most one tile that is not full.
    """
    device = indices.device
    expert, order = indices.flatten().sort(stable=True)
    rows = len(order)
    slot = torch.empty_like(order)
    slot[order] = torch.arange(rows, device=device)
    bounds = torch.searchsorted(expert, torch.arange(num_experts + 1, device=device))
    counts = (bounds.diff() + block - 1) // block
    ends = counts.cumsum(0)
    tile = torch.arange(rows // block + min(rows, num_experts), device=device)
    owner = torch.searchsorted(ends, tile, right=True)
    spare = owner == num_experts
    owner = owner.clamp(max=num_experts - 1)
    first = bounds[owner] + (tile - (ends - counts)[owner]) * block
    end = bounds[owner + 1].masked_fill(spare, 0)
    return _Plan(order // indices.shape[1], slot, order, bounds, torch.stack([owner, first, end]))


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _product(
    left: Tensor,
    matrices: Tensor,
    out: Tensor,
    plan: _Plan,
    *,
    gather: bool = False,
    epilogue: int = _PLAIN,
    fused: dict[str, Any] | None = None,
) -> None:
    """out[row] = left[row or its token] @ matrices[expert of row], with an epilogue."""
    fused = fused or {}
    blocks, tiles = _product_blocks(left.dtype, len(plan.order), len(matrices)), plan.tiles.shape[1]
    columns = triton.cdiv(out.shape[1], blocks.columns)
    if tiles:
        _product_kernel[(tiles * columns,)](
            left, matrices, out, plan.token, plan.tiles,
            fused.get("weights"), fused.get("h"), fused.get("activated"), fused.get("partial"),
            tiles, columns, out.shape[1], left.shape[1], left.stride(0), *matrices.stride(),
            GATHER=gather, EPILOGUE=epilogue, KEEP_PRODUCT=fused.get("KEEP_PRODUCT", True),
            INTERPRETED=INTERPRETED, PRECISION=_precision(),
            ROWS=blocks.rows, COLUMNS=blocks.columns, INNER=blocks.inner,
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip


def _weight_gradient(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    plan: _Plan,
    *,
    gather_left: bool = False,
    gather_right: bool = False,
) -> None:
    """out[e] = left[rows of e]^T right[rows of e]; zero for an expert without tokens."""
    blocks = _blocks(left.dtype, _WEIGHT_GRADIENT)
    experts, height, width = out.shape
    down, across = triton.cdiv(height, blocks.rows), triton.cdiv(width, blocks.columns)
    _weight_gradient_kernel[(experts * down * across,)](
        left, right, out, plan.token, plan.bounds,
        down, across, height, width, left.stride(0), right.stride(0),
        GATHER_LEFT=gather_left, GATHER_RIGHT=gather_right,
        INTERPRETED=INTERPRETED, PRECISION=_precision(),
        ROWS=blocks.rows, COLUMNS=blocks.columns, INNER=blocks.inner,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages,
    )  # fmt: skip


def _combine(rows: Tensor, slot: Tensor, tokens: int) -> Tensor:
    """Each token's sum over its slots, in their order."""
    out = rows.new_empty(tokens, rows.shape[1])
    if tokens:
        block = min(_COMBINE_BLOCK, triton.next_power_of_2(rows.shape[1]))
        _combine_kernel[(tokens, triton.cdiv(rows.shape[1], block))](
            rows, slot, out, rows.shape[1], len(slot) // tokens, BLOCK=block
        )
    return out


@jit
def _product_kernel(
    left_ptr, matrices_ptr, out_ptr, token_ptr, tiles_ptr,
    weights_ptr, h_ptr, activated_ptr, partial_ptr,
    tiles, column_tiles, width, inner_size, stride_left, stride_expert, stride_inner, stride_column,
    GATHER: tl.constexpr, EPILOGUE: tl.constexpr, KEEP_PRODUCT: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of left @ matrices[expert]; tiles of the same rows run side by side.

    EPILOGUE 1: the tile is h; the kernel also writes a = w relu(h)^2.
    EPILOGUE 2: the tile is the gradient g of relu(h)^2 w. The kernel writes dh = 2 w relu(h) g in
    its place, a = w relu(h)^2, and each row's sum of g relu(h)^2, the part of dw from these
    columns.
    """
    tile = tl.program_id(0) // column_tiles
    column_tile = tl.program_id(0) % column_tiles
    expert = tl.load(tiles_ptr + tile)
    first = tl.load(tiles_ptr + tiles + tile)
    end = tl.load(tiles_ptr + 2 * tiles + tile)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < end, column < width
    source = row
    if GATHER:
        source = tl.load(token_ptr + row, mask=row_mask, other=0)
    lefts = left_ptr + source[:, None] * stride_left
    rights = matrices_ptr + expert * stride_expert + column[None, :] * stride_column
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, inner_size, INNER):
        inner = start + tl.arange(0, INNER)
        inside = inner < inner_size
        left = tl.load(lefts + inner[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        right = tl.load(
            rights + inner[:, None] * stride_inner,
            mask=inside[:, None] & column_mask[None, :], other=0.0,
        )  # fmt: skip
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    at = row[:, None] * width + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if EPILOGUE == 0:
        tl.store(out_ptr + at, sums.to(dtype), mask=mask)
    else:
        weight = tl.load(weights_ptr + row, mask=row_mask, other=0.0).to(tl.float32)[:, None]
        if EPILOGUE == 1:
            h = sums.to(dtype)
            if KEEP_PRODUCT:
                tl.store(out_ptr + at, h, mask=mask)
            positive = tl.maximum(h.to(tl.float32), 0.0)
        else:
            h = tl.load(h_ptr + at, mask=mask, other=0.0)
            positive = tl.maximum(h.to(tl.float32), 0.0)
            tl.store(out_ptr + at, (2 * weight * positive * sums).to(dtype), mask=mask)
            part = tl.sum(positive * positive * sums, axis=1)
            tl.store(partial_ptr + row * column_tiles + column_tile, part, mask=row_mask)
        activated = weight * positive * positive
        tl.store(activated_ptr + at, activated.to(dtype), mask=mask)


@jit
def _weight_gradient_kernel(
    left_ptr, right_ptr, out_ptr, token_ptr, bounds_ptr,
    down_tiles, across_tiles, height, width, stride_left, stride_right,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One tile of sum over an expert's rows of left[row]^T right[row], rows in their order."""
    across = tl.program_id(0) % across_tiles
    down = tl.program_id(0) // across_tiles % down_tiles
    expert = (tl.program_id(0) // (across_tiles * down_tiles)).to(tl.int64)
    first = tl.load(bounds_ptr + expert)
    end = tl.load(bounds_ptr + expert + 1)
    m = down * ROWS + tl.arange(0, ROWS)
    n = across * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(first, end, INNER):
        row = start + tl.arange(0, INNER)
        inside = row < end
        left_row, right_row = row, row
        if GATHER_LEFT:
            left_row = tl.load(token_ptr + row, mask=inside, other=0)
        if GATHER_RIGHT:
            right_row = tl.load(token_ptr + row, mask=inside, other=0)
        left = tl.load(
            left_ptr + left_row[None, :] * stride_left + m[:, None],
            mask=inside[None, :] & (m < height)[:, None], other=0.0,
        )  # fmt: skip
        right = tl.load(
            right_ptr + right_row[:, None] * stride_right + n[None, :],
            mask=inside[:, None] & (n < width)[None, :], other=0.0,
        )  # fmt: skip
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    at = (expert * height + m[:, None]) * width + n[None, :]
    mask = (m < height)[:, None] & (n < width)[None, :]
    tl.store(out_ptr + at, sums.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _combine_kernel(rows_ptr, slot_ptr, out_ptr, width, choices, BLOCK: tl.constexpr):
    """out_t = sum_i rows[slot_ti], i in order."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(choices):
        row = tl.load(slot_ptr + token * choices + choice)
        total += tl.load(rows_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=mask)
