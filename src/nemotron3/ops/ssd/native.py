"""The scan in C++ (see native.cpp).

The forward pass keeps only the inputs. The backward pass recomputes the states between chunks, a
seventh of the arithmetic, instead of storing all of them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.native import FLOATS, NativeFunction, ParallelKernel, name_of
from nemotron3.ops.segments import Segments

_SOURCE = Path(__file__).with_name("native.cpp")
_forward = {
    dtype: NativeFunction(_SOURCE, f"ssd_forward_{name_of(dtype)}", "pppppppppp iiiiiiiii")
    for dtype in FLOATS
}
_backward = {
    dtype: NativeFunction(_SOURCE, f"ssd_backward_{name_of(dtype)}", "p" * 17 + "iiiiiiiiii")
    for dtype in FLOATS
}
_steps = {
    dtype: ParallelKernel(_SOURCE, f"ssd_steps_{name_of(dtype)}", "pppppppppp iiiiiiiiiii")
    for dtype in FLOATS
}
"""By the dtype of x, B and C. Step sizes, rates and states are float32."""

_Operands = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def ssd_native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    *,
    segments: Segments,
    initial_states: Tensor,
    chunk_size: int,  # noqa: ARG001 - the processor's cache determines the chunk size
) -> tuple[Tensor, Tensor]:
    """Scan each segment; shapes as in `nemotron3.ops.ssd.api.ssd`."""
    operands = _laid_out(x, dt, A, B, C, D, initial_states)
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return _Scan.apply(*operands, segments)
    return _scan(operands, segments)


def ssd_steps_native(
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
    operands = _laid_out(x, dt, A, B, C, D, ssm_states)
    y, rows = _like(x), len(slots)
    _steps[x.dtype](
        *operands, slots, intermediate_states, y, rows, len(x) // rows, *_sizes(operands),
        0 if intermediate_states is None else intermediate_states.stride(0),
        work=rows * ssm_states[0].numel(),
    )  # fmt: skip
    return y


def _laid_out(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor
) -> _Operands:
    """The operands as C++ reads them: only the token stride is free, so slices are not copied."""
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    rest = (A.contiguous(), _rows(B), _rows(C), D.contiguous(), initial.contiguous())
    return (_rows(x), dt, *rest)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous()


def _like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def _sizes(operands: _Operands) -> tuple[int, ...]:
    x, dt, _, B, C, _, _ = operands
    _, heads, head_dim = x.shape
    _, groups, d_state = B.shape
    strides = (x.stride(0), dt.stride(0), B.stride(0), C.stride(0))
    return (heads, head_dim, groups, d_state, *strides)


def _scan(operands: _Operands, segments: Segments) -> tuple[Tensor, Tensor]:
    y, final = _like(operands[0]), _like(operands[-1])
    bounds = segments.cu_seqlens(y.device)
    _forward[y.dtype](*operands, bounds, y, final, len(segments), *_sizes(operands))
    return y, final


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        initial: Tensor,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]:
        operands = (x, dt, A, B, C, D, initial)
        ctx.save_for_backward(*operands)
        ctx.segments = segments
        ctx.set_materialize_grads(False)
        return _scan(operands, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        operands: _Operands = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        dy = torch.zeros_like(operands[0]) if dy is None else _rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        always = (1, 2, 5)  # gradients of dt, A and D come with the others
        # Those of B and C are sums over heads, and stay float32 until they are complete.
        gradients = [
            _like(t, torch.float32 if i in (3, 4) else t.dtype)
            if wanted[i] or i in always
            else None
            for i, t in enumerate(operands)
        ]
        _backward[dy.dtype](
            *operands, ctx.segments.cu_seqlens(dy.device), dy, dfinal, *gradients,
            len(ctx.segments), *_sizes(operands), dy.stride(0),
        )  # fmt: skip
        return (
            *(
                g.to(t.dtype) if w and g is not None else None
                for g, t, w in zip(gradients, operands, wanted, strict=False)
            ),
            None,
        )
