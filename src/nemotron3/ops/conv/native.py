"""The causal convolution in C++ (native.cpp says how).

The backward pass keeps nothing but the inputs: it convolves again.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.native import NativeFunction, contiguous_rows
from nemotron3.ops.segments import Segments

_SOURCE = Path(__file__).with_name("native.cpp")
_forward = NativeFunction(_SOURCE, "conv_forward", "ppppppp iiii")
_backward = NativeFunction(_SOURCE, "conv_backward", "ppppppppppp iiiii")


def causal_conv_native(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments, tails: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve all segments; shapes as in `nemotron3.ops.conv.api.causal_conv`."""
    x, weight, tails = contiguous_rows(x), weight.contiguous(), tails.contiguous()
    bias = None if bias is None else bias.contiguous()
    learns = any(t is not None and t.requires_grad for t in (x, weight, bias, tails))
    if torch.is_grad_enabled() and learns:
        return _Convolution.apply(x, weight, bias, tails, segments)
    return _convolve(x, weight, bias, tails, segments)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, tails: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    channels, taps = weight.shape
    y, new_tails = x.new_empty(x.shape), torch.empty_like(tails)
    bounds = segments.cu_seqlens(x.device)
    sizes = (len(segments), taps, channels, x.stride(0))
    _forward(x, weight, bias, tails, bounds, y, new_tails, *sizes)
    return y, new_tails


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tails: Tensor,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, tails)
        ctx.segments = segments
        ctx.set_materialize_grads(False)
        return _convolve(x, weight, bias, tails, segments)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, d_new_tails: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, tails = ctx.saved_tensors
        segments: Segments = ctx.segments
        needs_x, _, _, needs_tails, _ = ctx.needs_input_grad
        grad = x.new_zeros(x.shape) if dy is None else contiguous_rows(dy)
        d_new_tails = None if d_new_tails is None else d_new_tails.contiguous()
        dx = x.new_empty(x.shape) if needs_x else None
        d_weight = torch.empty_like(weight)
        d_bias = None if bias is None else torch.empty_like(bias)
        d_tails = torch.empty_like(tails) if needs_tails else None
        channels, taps = weight.shape
        sizes = (len(segments), taps, channels, x.stride(0), grad.stride(0))
        _backward(
            x, weight, bias, tails, segments.cu_seqlens(x.device), grad, d_new_tails,
            dx, d_weight, d_bias, d_tails, *sizes,
        )  # fmt: skip
        return dx, d_weight, d_bias, d_tails, None
