"""The causal convolution in C++ (see native.cpp).

The forward pass keeps only the inputs: the backward pass recomputes the convolution.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import FLOATS, NativeFunction, name_of
from nemotron3.ops.segments import Segments

_SOURCE = Path(__file__).with_name("native.cpp")
_forward = {
    dtype: NativeFunction(_SOURCE, f"conv_forward_{name_of(dtype)}", "ppppppp iiii")
    for dtype in FLOATS
}
_backward = {
    dtype: NativeFunction(_SOURCE, f"conv_backward_{name_of(dtype)}", "ppppppppppp iiiii")
    for dtype in FLOATS
}


def causal_conv_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments, conv_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve all segments; shapes as in `nemotron3.ops.conv.api.causal_conv`."""
    x, weight, conv_states = (
        contiguous_rows(x),
        weight.float().contiguous(),
        conv_states.contiguous(),
    )
    bias = None if bias is None else bias.float().contiguous()
    learns = any(t is not None and t.requires_grad for t in (x, weight, bias, conv_states))
    if torch.is_grad_enabled() and learns:
        return _Convolution.apply(x, weight, bias, conv_states, segments)
    return _convolve(x, weight, bias, conv_states, segments)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_states: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    channels, taps = weight.shape
    y, new_conv_states = x.new_empty(x.shape), torch.empty_like(conv_states)
    bounds = segments.cu_seqlens(x.device)
    sizes = (len(segments), taps, channels, x.stride(0))
    _forward[x.dtype](x, weight, bias, conv_states, bounds, y, new_conv_states, *sizes)
    return y, new_conv_states


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_states: Tensor,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, conv_states)
        ctx.segments = segments
        ctx.set_materialize_grads(False)
        return _convolve(x, weight, bias, conv_states, segments)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, d_new_conv_states: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, conv_states = ctx.saved_tensors
        segments: Segments = ctx.segments
        needs_x, _, _, needs_conv_states, _ = ctx.needs_input_grad
        grad = x.new_zeros(x.shape) if dy is None else contiguous_rows(dy)
        d_new_conv_states = None if d_new_conv_states is None else d_new_conv_states.contiguous()
        dx = x.new_empty(x.shape) if needs_x else None
        d_weight = torch.empty_like(weight)
        d_bias = None if bias is None else torch.empty_like(bias)
        d_conv_states = torch.empty_like(conv_states) if needs_conv_states else None
        channels, taps = weight.shape
        sizes = (len(segments), taps, channels, x.stride(0), grad.stride(0))
        _backward[x.dtype](
            x, weight, bias, conv_states, segments.cu_seqlens(x.device), grad, d_new_conv_states,
            dx, d_weight, d_bias, d_conv_states, *sizes,
        )  # fmt: skip
        return dx, d_weight, d_bias, d_conv_states, None
