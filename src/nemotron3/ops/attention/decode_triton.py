"""Attention of a decoding step over paged keys, as Triton kernels that split the keys.

One new token that attends to a million cached ones is bound by reading them, and must fill the
device although there may be only one sequence and two key heads. So a sequence's keys are cut into
ranges with one program each, and a second kernel combines the ranges' results (flash-decoding):
with s = q k^T / sqrt(head_dim) a range writes its maximum m, the sum l of exp(s - m) and o, the sum
of exp(s - m) v; the result is sum(exp(m - M) o) / sum(exp(m - M) l), with M the largest m.

* All query heads that share keys, and all new tokens, are rows of one product: keys are read once.
* The number of ranges follows from the width of the page table. The end of each range follows from
  the sequence's own length, which is read on the device. So the launches do not depend on any
  length (they can be captured in a CUDA graph), and a sequence's sums do not depend on the others.
* New keys and values are written into their pages first, in a launch of their own, and then read
  like all others.
"""

# A Triton kernel takes pointers and numbers without annotations, and often many of them.
# ruff: noqa: ANN001, ANN202, ARG001
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAssignmentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron3.ops.kernels import INTERPRETED, require_kernel_dtypes

jit: Any = triton.jit
_MAX_RANGES = 128
"""Ranges of one sequence. With two key heads they fill a large GPU, and combining them is cheap."""
_RANGE_KEYS = 512
"""Fewest keys of a range: the sums that it writes must be small beside the keys that it reads."""
_RANGES = {"BLOCK_ROWS": 64, "BLOCK_KEYS": 64, "num_warps": 4, "num_stages": 5}
"""New tokens beyond BLOCK_ROWS go to another program, which reads the keys again."""
_RANGES_FLOAT32 = {"BLOCK_ROWS": 16, "BLOCK_KEYS": 32, "num_warps": 8, "num_stages": 2}
"""Float32 products without TF32 rounding use registers; larger tiles would spill them."""
_JOINED = 16
"""Ranges that are combined at a time."""


def attention_steps_triton(
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
    require_kernel_dtypes("attention_steps", q, k, v, keys, values)
    (tokens, heads, head_dim), kv_heads, page_size = q.shape, k.shape[1], keys.shape[1]
    rows, group = len(slots), heads // kv_heads
    steps = tokens // rows
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    width = int(triton.next_power_of_2(head_dim))
    places = table, slots, cached_lengths, table.stride(0), page_size
    sizes = {"STEPS": steps, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "WIDTH": width}
    _write_kernel[(tokens * kv_heads,)](
        k, v, keys, values, *places,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), **sizes, num_warps=1,
    )  # fmt: skip

    ranges = _num_ranges(table.shape[1] * page_size)
    parts = torch.empty(tokens * heads, ranges, head_dim, dtype=torch.float32, device=q.device)
    scales = torch.empty(tokens * heads, ranges, 2, dtype=torch.float32, device=q.device)
    sizes |= {"GROUP": group, "RANGES": ranges, "RANGE_KEYS": _RANGE_KEYS}
    settings = _settings(q.dtype, steps * group)
    _range_kernel[(ranges, rows * kv_heads, triton.cdiv(steps * group, settings["BLOCK_ROWS"]))](
        q, keys, values, *places, parts, scales, q.stride(0), q.stride(1), head_dim**-0.5,
        DOT_WIDTH=max(16, width), ONE_PAGE=page_size % settings["BLOCK_KEYS"] == 0,
        INTERPRETED=INTERPRETED, **sizes, **settings,
    )  # fmt: skip
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _join_kernel[(tokens * heads,)](
        parts, scales, slots, cached_lengths, y,
        BLOCK_KEYS=settings["BLOCK_KEYS"], BLOCK_RANGES=_JOINED, **sizes, num_warps=4,
    )  # fmt: skip
    return y


def _num_ranges(most_keys: int) -> int:
    return max(1, min(_MAX_RANGES, int(triton.cdiv(most_keys, _RANGE_KEYS))))


def _settings(dtype: torch.dtype, rows: int) -> dict[str, int]:
    """Tile sizes; `tl.dot` needs at least sixteen rows."""
    settings = _RANGES_FLOAT32 if dtype == torch.float32 else _RANGES
    block = min(settings["BLOCK_ROWS"], max(16, int(triton.next_power_of_2(rows))))
    settings = settings | {"BLOCK_ROWS": block}
    return settings | ({"BLOCK_KEYS": 16} if INTERPRETED else {})


@jit
def _keys_of_a_range(length, RANGES: tl.constexpr, RANGE_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Keys of each range of a sequence except the last: a multiple of BLOCK."""
    keys = tl.maximum(tl.cdiv(length, RANGES), RANGE_KEYS)
    return tl.cdiv(keys, BLOCK) * BLOCK


@jit
def _write_kernel(
    k, v, keys, values, table, slots, cached_lengths, stride_table, page_size,
    stride_k, stride_k_head, stride_v, stride_v_head,
    STEPS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write one new token's key and value of one head into its page."""
    token = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    row = token // STEPS
    slot = tl.load(slots + row)
    if slot < 0:
        return
    d = tl.arange(0, WIDTH)
    exists = d < HEAD_DIM
    position = tl.load(cached_lengths + row) + token % STEPS
    page = tl.load(table + slot * stride_table + position // page_size)
    at = ((page * page_size + position % page_size) * KV_HEADS + head) * HEAD_DIM + d
    key = tl.load(k + token * stride_k + head * stride_k_head + d, mask=exists)
    tl.store(keys + at, key.to(keys.dtype.element_ty), mask=exists)
    value = tl.load(v + token * stride_v + head * stride_v_head + d, mask=exists)
    tl.store(values + at, value.to(values.dtype.element_ty), mask=exists)


@jit
def _range_kernel(
    q, keys, values, table, slots, cached_lengths, stride_table, page_size,
    parts, scales, stride_q, stride_q_head, scale,
    STEPS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, RANGES: tl.constexpr, RANGE_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DOT_WIDTH: tl.constexpr,
    ONE_PAGE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One range of one sequence's keys, for the new tokens and query heads of one key head."""
    part = tl.program_id(0)
    row = (tl.program_id(1) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(1) % KV_HEADS).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    before = tl.load(cached_lengths + row)
    length = before + STEPS
    share = _keys_of_a_range(length, RANGES, RANGE_KEYS, BLOCK_KEYS)
    first = part * share
    if first >= length:
        return
    end = tl.minimum(first + share, length)

    m = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = m < STEPS * GROUP
    step, head = m // GROUP, kv_head * GROUP + m % GROUP
    token = row * STEPS + step
    d = tl.arange(0, DOT_WIDTH)
    is_d = d < HEAD_DIM
    queries = tl.load(
        q + token[:, None] * stride_q + head[:, None] * stride_q_head + d[None, :],
        mask=is_row[:, None] & is_d[None, :], other=0.0,
    )  # fmt: skip
    # Keys of a narrower dtype are cast up, so that neither queries nor weights are rounded to it.
    dtype: tl.constexpr = tl.float32 if INTERPRETED else q.dtype.element_ty
    queries = queries.to(dtype)
    pages = table + slot * stride_table
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    sums = tl.zeros((BLOCK_ROWS, DOT_WIDTH), tl.float32)
    for start in range(first, end, BLOCK_KEYS):
        position = start + tl.arange(0, BLOCK_KEYS)
        inside = position < end
        if ONE_PAGE:
            page = tl.load(pages + start // page_size)
        else:
            page = tl.load(pages + position // page_size, mask=inside, other=0)
        at = ((page * page_size + position % page_size) * KV_HEADS + kv_head) * HEAD_DIM
        key = tl.load(
            keys + at[None, :] + d[:, None], mask=inside[None, :] & is_d[:, None], other=0.0
        )
        scores = tl.dot(queries, key.to(dtype), input_precision="ieee") * scale
        seen = inside[None, :] & (position[None, :] <= (before + step)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A token may see no key of a range; -inf - (-inf) would be NaN.
        zero = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - zero[:, None])
        fade = tl.exp(top - zero)
        total = total * fade + tl.sum(weights, axis=1)
        value = tl.load(
            values + at[:, None] + d[None, :], mask=inside[:, None] & is_d[None, :], other=0.0
        )
        sums = sums * fade[:, None]
        sums = tl.dot(weights.to(dtype), value.to(dtype), sums, input_precision="ieee")
        top = new_top
    place = (token * (KV_HEADS * GROUP) + head) * RANGES + part
    tl.store(
        parts + place[:, None] * HEAD_DIM + d[None, :], sums, mask=is_row[:, None] & is_d[None, :]
    )
    tl.store(scales + place * 2, top, mask=is_row)
    tl.store(scales + place * 2 + 1, total, mask=is_row)


@jit
def _join_kernel(
    parts, scales, slots, cached_lengths, y,
    STEPS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    GROUP: tl.constexpr, RANGES: tl.constexpr, RANGE_KEYS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_RANGES: tl.constexpr,
):  # fmt: skip
    """Combine the ranges' results for one new token and query head."""
    place = tl.program_id(0).to(tl.int64)
    row = place // (STEPS * KV_HEADS * GROUP)
    d = tl.arange(0, WIDTH)
    is_d = d < HEAD_DIM
    sums = tl.zeros((WIDTH,), tl.float32)
    total = 0.0
    if tl.load(slots + row) >= 0:
        length = tl.load(cached_lengths + row) + STEPS
        used = tl.cdiv(length, _keys_of_a_range(length, RANGES, RANGE_KEYS, BLOCK_KEYS))
        top = float("-inf")
        for first in range(0, used, BLOCK_RANGES):
            part = place * RANGES + first + tl.arange(0, BLOCK_RANGES)
            is_part = first + tl.arange(0, BLOCK_RANGES) < used
            found = tl.load(scales + part * 2, mask=is_part, other=float("-inf"))
            # The first range has a key that every new token sees, so this is finite.
            new_top = tl.maximum(top, tl.max(found, axis=0))
            weights = tl.exp(found - new_top)
            fade = tl.exp(top - new_top)
            some = tl.load(scales + part * 2 + 1, mask=is_part, other=0.0)
            total = total * fade + tl.sum(weights * some, axis=0)
            sums_of_parts = tl.load(
                parts + part[:, None] * HEAD_DIM + d[None, :],
                mask=is_part[:, None] & is_d[None, :], other=0.0,
            )  # fmt: skip
            sums = sums * fade + tl.sum(weights[:, None] * sums_of_parts, axis=0)
            top = new_top
        sums = sums / total
    tl.store(y + place * HEAD_DIM + d, sums.to(y.dtype.element_ty), mask=is_d)
