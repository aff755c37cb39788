"""The scan in C++ (native.cpp says how)."""

from pathlib import Path

import torch
from torch import Tensor

from nemotron3.ops.native import NativeFunction
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd.chunked import ssd_chunked
from nemotron3.ops.ssd.step import ssd_steps

_SOURCE = Path(__file__).with_name("native.cpp")
_forward = NativeFunction(_SOURCE, "ssd_forward", "pppppppppp iiiiiiiii")
_steps = NativeFunction(_SOURCE, "ssd_steps", "ppppppppp iiiiiiiiii")


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
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Scan each segment; shapes as in `nemotron3.ops.ssd.api.ssd`."""
    operands = (x, dt, A, B, C, D, initial_states)
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return ssd_chunked(
            x, dt, A, B, C, D,
            segments=segments, initial_states=initial_states, chunk_size=chunk_size,
        )  # fmt: skip
    return _scan(*_laid_out(*operands), segments)


def ssd_steps_native(
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
    """Advance every segment by its few tokens; gradients are those of PyTorch's operations."""
    operands = (x, dt, A, B, C, D, initial_states)
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return ssd_steps(x, dt, A, B, C, D, segments=segments, initial_states=initial_states)
    x, dt, A, B, C, D, initial = _laid_out(*operands)
    y, final = x.new_empty(x.shape), torch.empty_like(initial)
    rows = len(segments)
    _steps(x, dt, A, B, C, D, initial, y, final, rows, segments.total // rows, *_sizes(x, dt, B, C))
    return y, final


def _laid_out(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor
) -> tuple[Tensor, ...]:
    """The operands as C++ reads them: only the stride of tokens is free, as slices have it."""
    x, B, C = (t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in (x, B, C))
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    return x, dt, A.contiguous(), B, C, D.contiguous(), initial.contiguous()


def _sizes(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[int, ...]:
    return (*x.shape[1:], *B.shape[1:], x.stride(0), dt.stride(0), B.stride(0), C.stride(0))


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial: Tensor,
    segments: Segments,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, final = x.new_empty(x.shape), torch.empty_like(initial)
    bounds = segments.cu_seqlens(x.device)
    _forward(x, dt, A, B, C, D, initial, bounds, y, final, len(segments), *_sizes(x, dt, B, C))
    return y, final
