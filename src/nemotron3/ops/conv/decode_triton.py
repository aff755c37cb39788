"""Decoding steps of the convolution as a Triton kernel: states are read once and written in place.

A program computes all new tokens of one sequence for a block of channels. A tap reads either a new
token or an entry of the state, and which of the two is known when the kernel is compiled, since
tokens and taps are few. The entries of a state move towards its start, so a program that writes
them in order overwrites none that it has yet to read.
"""

# ruff: noqa: ANN001, ANN202, PLR0913
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron3.ops.kernels import contiguous_rows, require_kernel_dtypes

_STEPS = {"BLOCK": 256, "num_warps": 4}
"""BLOCK is the number of channels of a program."""


@triton.jit
def _before(
    x, conv_state, place: tl.constexpr, channel, exists, channels, stride_x, STATE_LEN: tl.constexpr
):  # fmt: skip
    """Entry `place` of a sequence's history: its state, then its new tokens."""
    at = conv_state + place * channels if place < STATE_LEN else x + (place - STATE_LEN) * stride_x
    return tl.load(at + channel, mask=exists, other=0.0)


@triton.jit
def _steps_kernel(
    x, weight, bias, conv_states, slots, intermediate_states, y, channels, stride_x,
    stride_intermediate, stride_intermediate_step,
    LENGTH: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Convolve LENGTH tokens of one sequence, in BLOCK channels."""
    STATE_LEN: tl.constexpr = TAPS - 1
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = channel < channels
    slot = tl.load(slots + row)
    x += row * LENGTH * stride_x
    y += row * LENGTH * channels
    if slot < 0:
        for t in tl.static_range(LENGTH):
            none = tl.zeros((BLOCK,), y.dtype.element_ty)
            tl.store(y + t * channels + channel, none, mask=exists)
        return
    conv_state = conv_states + slot * STATE_LEN * channels
    start = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        start = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    for t in tl.static_range(LENGTH):
        total = start
        for tap in tl.static_range(TAPS):
            w = tl.load(weight + channel * TAPS + tap, mask=exists, other=0.0).to(tl.float32)
            value = _before(x, conv_state, t + tap, channel, exists, channels, stride_x, STATE_LEN)
            total += w * value.to(tl.float32)
        out = total / (1.0 + tl.exp(-total))
        tl.store(y + t * channels + channel, out.to(y.dtype.element_ty), mask=exists)
        if EVERY:
            after = intermediate_states + row * stride_intermediate + t * stride_intermediate_step
            for place in tl.static_range(STATE_LEN):
                value = _before(
                    x, conv_state, t + 1 + place, channel, exists, channels, stride_x, STATE_LEN
                )  # fmt: skip
                value = value.to(intermediate_states.dtype.element_ty)
                tl.store(after + place * channels + channel, value, mask=exists)
    if not EVERY:
        for place in tl.static_range(STATE_LEN):
            value = _before(
                x, conv_state, LENGTH + place, channel, exists, channels, stride_x, STATE_LEN
            )
            tl.store(
                conv_state + place * channels + channel,
                value.to(conv_state.dtype.element_ty),
                mask=exists,
            )


def causal_conv_steps_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_states: Tensor,
    slots: Tensor,
    intermediate_states: Tensor | None,
) -> Tensor:
    """Shapes as in `nemotron3.ops.conv.api.causal_conv_steps`."""
    require_kernel_dtypes("conv_steps", x, weight, bias, conv_states)
    x, rows, (channels, taps) = contiguous_rows(x), len(slots), weight.shape
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _steps_kernel[(rows, triton.cdiv(channels, _STEPS["BLOCK"]))](
        x, weight.contiguous(), bias, conv_states, slots,
        conv_states if intermediate_states is None else intermediate_states, y,
        channels, x.stride(0),
        *((0, 0) if intermediate_states is None else intermediate_states.stride()[:2]),
        LENGTH=len(x) // rows, TAPS=taps, HAS_BIAS=bias is not None,
        EVERY=intermediate_states is not None,
        **_STEPS,
    )  # fmt: skip
    return y
