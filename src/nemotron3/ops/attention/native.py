"""Attention of whole sequences in C++, block by block (see native.cpp).

For the backward pass the forward pass keeps the operands, the result, and one number for each row
of scores.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.native import FLOATS, NativeFunction, name_of
from nemotron3.ops.segments import Segments

_SOURCE = Path(__file__).with_name("native.cpp")
_forward = {
    dtype: NativeFunction(_SOURCE, f"attention_forward_{name_of(dtype)}", "ppppppp iiiiiii")
    for dtype in FLOATS
}
_backward = {
    dtype: NativeFunction(_SOURCE, f"attention_backward_{name_of(dtype)}", "ppppppppppp iiiiiiii")
    for dtype in FLOATS
}


def attention_native(
    q: Tensor, k: Tensor, v: Tensor, *, queries: Segments, keys: Segments
) -> Tensor:
    """Attend in all segments; shapes as in `nemotron3.ops.attention.api.attention`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _Attention.apply(q, k, v, queries, keys)
    return _attend(q, k, v, queries, keys, sums=None)


def _rows(t: Tensor) -> Tensor:
    """`t` in the layout that C++ reads: only the token stride is free, so a slice is not copied."""
    return t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous()


def _bounds(queries: Segments, keys: Segments, like: Tensor) -> tuple[Tensor, Tensor]:
    return queries.cu_seqlens(like.device), keys.cu_seqlens(like.device)


def _sizes(q: Tensor, k: Tensor, v: Tensor, queries: Segments) -> tuple[int, ...]:
    _, heads, head_dim = q.shape
    return (len(queries), heads, k.shape[1], head_dim, q.stride(0), k.stride(0), v.stride(0))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments, sums: Tensor | None
) -> Tensor:
    y = q.new_empty(q.shape)
    _forward[q.dtype](q, k, v, *_bounds(queries, keys, q), y, sums, *_sizes(q, k, v, queries))
    return y


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, queries: Segments, keys: Segments
    ) -> Tensor:
        sums = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        y = _attend(q, k, v, queries, keys, sums)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.queries, ctx.keys = queries, keys
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, sums = ctx.saved_tensors
        dy = _rows(dy)
        dk, dv = (t.new_empty(t.shape) for t in (k, v))
        dq = q.new_empty(q.shape, dtype=torch.float32)
        _backward[q.dtype](
            q, k, v, *_bounds(ctx.queries, ctx.keys, q), y, sums, dy, dq, dk, dv,
            *_sizes(q, k, v, ctx.queries), dy.stride(0),
        )  # fmt: skip
        return dq.to(q.dtype), dk, dv, None, None
