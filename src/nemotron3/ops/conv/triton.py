"""The short causal convolution and its SiLU in one pass over memory.

The sum of shifted copies reads and writes the stream once per tap. Here a program reads a block of
tokens and channels, finds the tokens before it in the cache, and writes only the result. The
backward pass recomputes the convolution, which costs a few multiply-adds and saves a stored tensor:
it reads inputs and gradients once and writes the gradient of the inputs once.

Boundaries come from the index of each token's segment; a tap that reaches before a segment's first
token reads the segment's state. Each program sums the gradients of weight and bias over its own
span of tokens, and the programs' sums are added in a fixed order, so no sum depends on timing.
"""

# A Triton kernel takes pointers and numbers without annotations, and often many of them.
# ruff: noqa: ANN001, ANN202, PLR0913
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3.ops.kernels import contiguous_rows, require_kernel_dtypes
from nemotron3.ops.segments import Segments

jit: Any = triton.jit
# Tokens, channels and warps of a program. On compute capability 9.0 neither kernel spills; with 32
# tokens and 128 channels the backward kernel would spill 2 KB per thread.
_FORWARD = {"BLOCK_TOKENS": 16, "BLOCK_CHANNELS": 128, "num_warps": 4}
_BACKWARD = {"BLOCK_TOKENS": 16, "BLOCK_CHANNELS": 64, "num_warps": 8}
_STATES = {"BLOCK_CHANNELS": 128, "num_warps": 4}
_PROGRAMS = 2048
"""Programs that fill a large GPU a few times over; more would only make more partial sums."""


def causal_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments, conv_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve all segments at once; shapes as in `nemotron3.ops.conv.api.causal_conv`."""
    require_kernel_dtypes("conv", x, weight, bias)
    return _CausalConv.apply(x, weight, bias, conv_states, segments)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        conv_states: Tensor,
        segments: Segments,
    ) -> tuple[Tensor, Tensor]:
        x, weight, conv_states = contiguous_rows(x), weight.contiguous(), conv_states.contiguous()
        bias = None if bias is None else bias.contiguous()
        total, channels = x.shape
        ids, starts = segments.ids(x.device), segments.cu_seqlens(x.device)
        y = torch.empty(total, channels, dtype=x.dtype, device=x.device)
        new_conv_states = torch.empty_like(conv_states)
        taps = _taps(weight, bias)
        _forward_kernel[_grid(total, channels, _FORWARD)](
            x, weight, bias, conv_states, ids, starts, y,
            total, channels, x.stride(0), **taps, **_FORWARD,
        )  # fmt: skip
        if conv_states.numel():
            _conv_states_kernel[_grid(len(segments), channels, _STATES)](
                x, conv_states, starts, new_conv_states,
                channels, x.stride(0), ROWS=_state_rows(weight), TAPS=taps["TAPS"], **_STATES,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, conv_states)
        ctx.segments = segments
        ctx.set_materialize_grads(False)
        return y, new_conv_states

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, conv_states_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, conv_states = ctx.saved_tensors
        segments: Segments = ctx.segments
        total, channels = x.shape
        ids, starts = segments.ids(x.device), segments.cu_seqlens(x.device)
        grad = torch.zeros_like(x) if grad is None else contiguous_rows(grad)
        conv_states_grad = None if conv_states_grad is None else conv_states_grad.contiguous()
        tiles, blocks = _grid(total, channels, _BACKWARD)
        span = triton.cdiv(tiles * blocks, _PROGRAMS)
        spans = triton.cdiv(tiles, span)
        taps = _taps(weight, bias)
        dx = torch.empty(total, channels, dtype=x.dtype, device=x.device)
        d_weights = x.new_empty(spans, channels, taps["TAPS"], dtype=torch.float32)
        d_biases = x.new_empty(spans, channels, dtype=torch.float32)
        _backward_kernel[(spans, blocks)](
            x, weight, bias, conv_states, ids, starts, grad, conv_states_grad, dx, d_weights,
            d_biases,
            total, channels, span, x.stride(0), grad.stride(0),
            HAS_STATES_GRAD=conv_states_grad is not None,
            ROWS=triton.next_power_of_2(taps["TAPS"]), **taps, **_BACKWARD,
        )  # fmt: skip
        d_conv_states = None
        if ctx.needs_input_grad[3] and conv_states.numel():
            d_conv_states = torch.empty_like(conv_states)
            _conv_states_backward_kernel[_grid(len(segments), channels, _STATES)](
                x, weight, bias, conv_states, starts, grad, conv_states_grad, d_conv_states,
                channels, x.stride(0), grad.stride(0),
                HAS_STATES_GRAD=conv_states_grad is not None, ROWS=_state_rows(weight),
                **taps, **_STATES,
            )  # fmt: skip
        d_weight = d_weights.sum(0).to(weight.dtype)
        d_bias = None if bias is None else d_biases.sum(0).to(bias.dtype)
        return dx, d_weight, d_bias, d_conv_states, None


def _grid(rows: int, channels: int, block: dict[str, int]) -> tuple[int, int]:
    """Programs over rows (tokens, or segments one by one) and over channels."""
    return (
        int(triton.cdiv(rows, block.get("BLOCK_TOKENS", 1))),
        int(triton.cdiv(channels, block["BLOCK_CHANNELS"])),
    )


def _taps(weight: Tensor, bias: Tensor | None) -> dict[str, Any]:
    return {"TAPS": weight.shape[1], "HAS_BIAS": bias is not None}


def _state_rows(weight: Tensor) -> int:
    return int(triton.next_power_of_2(weight.shape[1] - 1))


@jit
def _input_at(
    x_ptr, conv_states_ptr, start, position, segment, channel, mask, channels, stride_x,
    TAPS: tl.constexpr,
):  # fmt: skip
    """x at `position` of its segment, [token, channel]; positions below 0 are the state's."""
    column = channel[None, :]
    token = start + position
    kept = segment * (TAPS - 1) + (TAPS - 1) + position
    inside = (channel < channels)[None, :]
    here = (mask & (position >= 0))[:, None] & inside
    before = (mask & (position < 0))[:, None] & inside
    x = tl.load(x_ptr + token[:, None] * stride_x + column, mask=here, other=0.0)
    conv_state = tl.load(
        conv_states_ptr + kept[:, None] * channels + column, mask=before, other=0.0
    )
    return x.to(tl.float32) + conv_state.to(tl.float32)


@jit
def _tap(weight_ptr, tap, channel, channels, TAPS: tl.constexpr):
    """Weight of one tap for a block of channels, as a row."""
    weight = tl.load(weight_ptr + channel * TAPS + tap, mask=channel < channels, other=0.0)
    return weight.to(tl.float32)[None, :]


@jit
def _preactivation(
    x_ptr, weight_ptr, bias_ptr, conv_states_ptr, start, position, segment, channel, mask,
    channels, stride_x,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """z_t = bias + sum_j weight_j x_{t - (K - 1) + j}."""
    z = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)
        z += bias.to(tl.float32)[None, :]
    for tap in tl.static_range(TAPS):
        x = _input_at(
            x_ptr, conv_states_ptr, start, position - (TAPS - 1) + tap, segment, channel, mask,
            channels, stride_x, TAPS,
        )  # fmt: skip
        z += _tap(weight_ptr, tap, channel, channels, TAPS) * x
    return z


@jit
def _preactivation_gradient(
    x_ptr, weight_ptr, bias_ptr, conv_states_ptr, grad_ptr, start, position, segment, channel, mask,
    channels, stride_x, stride_grad,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """dz = dy s (1 + z (1 - s)) with s = sigmoid(z); zero where `mask` is false."""
    z = _preactivation(
        x_ptr, weight_ptr, bias_ptr, conv_states_ptr, start, position, segment, channel, mask,
        channels, stride_x, TAPS, HAS_BIAS, BLOCK_TOKENS, BLOCK_CHANNELS,
    )  # fmt: skip
    at = (start + position)[:, None] * stride_grad + channel[None, :]
    grad = tl.load(grad_ptr + at, mask=mask[:, None] & (channel < channels)[None, :], other=0.0)
    s = tl.sigmoid(z)
    return grad.to(tl.float32) * s * (1 + z * (1 - s))


@jit
def _gradient_from_later(
    x_ptr, weight_ptr, bias_ptr, conv_states_ptr, grad_ptr, conv_states_grad_ptr,
    start, position, segment, length, channel, mask, channels, stride_x, stride_grad,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATES_GRAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of an input from the K - 1 outputs after its own, and from the new state.

    sum_{o >= 1} weight_{K - 1 - o} dz_{t + o} within the segment, plus the gradient of the new
    state where x_t is part of it.
    """
    dx = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), dtype=tl.float32)
    for ahead in tl.static_range(1, TAPS):
        later = position + ahead
        dz = _preactivation_gradient(
            x_ptr, weight_ptr, bias_ptr, conv_states_ptr, grad_ptr, start, later, segment, channel,
            mask & (later >= 0) & (later < length),
            channels, stride_x, stride_grad, TAPS, HAS_BIAS, BLOCK_TOKENS, BLOCK_CHANNELS,
        )  # fmt: skip
        dx += _tap(weight_ptr, TAPS - 1 - ahead, channel, channels, TAPS) * dz
    if HAS_STATES_GRAD:
        row = position - length + (TAPS - 1)
        at = (segment * (TAPS - 1) + row)[:, None] * channels + channel[None, :]
        kept = (mask & (row >= 0))[:, None] & (channel < channels)[None, :]
        dx += tl.load(conv_states_grad_ptr + at, mask=kept, other=0.0).to(tl.float32)
    return dx


@jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, conv_states_ptr, ids_ptr, starts_ptr, y_ptr,
    total, channels, stride_x,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = z sigmoid(z) for one block of tokens and channels."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    mask = token < total
    segment = tl.load(ids_ptr + token, mask=mask, other=0)
    start = tl.load(starts_ptr + segment)
    z = _preactivation(
        x_ptr, weight_ptr, bias_ptr, conv_states_ptr, start, token - start, segment, channel, mask,
        channels, stride_x, TAPS, HAS_BIAS, BLOCK_TOKENS, BLOCK_CHANNELS,
    )  # fmt: skip
    y = z * tl.sigmoid(z)
    at = token[:, None] * channels + channel[None, :]
    inside = mask[:, None] & (channel < channels)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _conv_states_kernel(
    x_ptr, conv_states_ptr, starts_ptr, new_conv_states_ptr, channels, stride_x,
    ROWS: tl.constexpr, TAPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The last K - 1 inputs of one segment; a shorter one keeps the end of its old state."""
    row = tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + segment)
    position = tl.load(starts_ptr + segment + 1) - start - (TAPS - 1) + row
    mask = row < TAPS - 1
    kept = _input_at(
        x_ptr, conv_states_ptr, start, position, segment, channel, mask, channels, stride_x, TAPS
    )
    at = (segment * (TAPS - 1) + row)[:, None] * channels + channel[None, :]
    inside = mask[:, None] & (channel < channels)[None, :]
    tl.store(new_conv_states_ptr + at, kept.to(new_conv_states_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    x_ptr, weight_ptr, bias_ptr, conv_states_ptr, ids_ptr, starts_ptr, grad_ptr,
    conv_states_grad_ptr,
    dx_ptr, d_weights_ptr, d_biases_ptr, total, channels, span, stride_x, stride_grad,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATES_GRAD: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx of `span` blocks of tokens, and their sums of dw_j = dz_t x_{t - (K - 1) + j}, db = dz."""
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    taps = tl.arange(0, ROWS)[:, None]
    d_weight = tl.zeros((ROWS, BLOCK_CHANNELS), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * span * BLOCK_TOKENS
    for block in range(span):
        token = first + block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        mask = token < total
        segment = tl.load(ids_ptr + token, mask=mask, other=0)
        start = tl.load(starts_ptr + segment)
        length = tl.load(starts_ptr + segment + 1) - start
        position = token - start
        dz = _preactivation_gradient(
            x_ptr, weight_ptr, bias_ptr, conv_states_ptr, grad_ptr, start, position, segment,
            channel,
            mask, channels, stride_x, stride_grad, TAPS, HAS_BIAS, BLOCK_TOKENS, BLOCK_CHANNELS,
        )  # fmt: skip
        dx = _tap(weight_ptr, TAPS - 1, channel, channels, TAPS) * dz
        dx += _gradient_from_later(
            x_ptr, weight_ptr, bias_ptr, conv_states_ptr, grad_ptr, conv_states_grad_ptr,
            start, position, segment, length, channel, mask, channels, stride_x, stride_grad,
            TAPS, HAS_BIAS, HAS_STATES_GRAD, BLOCK_TOKENS, BLOCK_CHANNELS,
        )  # fmt: skip
        at = token[:, None] * channels + channel[None, :]
        inside = mask[:, None] & (channel < channels)[None, :]
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        d_bias += tl.sum(dz, axis=0)
        for tap in tl.static_range(TAPS):
            x = _input_at(
                x_ptr, conv_states_ptr, start, position - (TAPS - 1) + tap, segment, channel, mask,
                channels, stride_x, TAPS,
            )  # fmt: skip
            d_weight += tl.where(taps == tap, tl.sum(dz * x, axis=0)[None, :], 0.0)
    row = tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(d_biases_ptr + row, d_bias, mask=channel < channels)
    at = row[None, :] * TAPS + taps
    tl.store(d_weights_ptr + at, d_weight, mask=(taps < TAPS) & (channel < channels)[None, :])


@jit
def _conv_states_backward_kernel(
    x_ptr, weight_ptr, bias_ptr, conv_states_ptr, starts_ptr, grad_ptr, conv_states_grad_ptr,
    d_conv_states_ptr,
    channels, stride_x, stride_grad,
    TAPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATES_GRAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of one segment's state: of inputs at the positions -(K - 1) to -1."""
    row = tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    segment = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + segment)
    length = tl.load(starts_ptr + segment + 1) - start
    mask = row < TAPS - 1
    d_state = _gradient_from_later(
        x_ptr, weight_ptr, bias_ptr, conv_states_ptr, grad_ptr, conv_states_grad_ptr,
        start, row - (TAPS - 1), segment, length, channel, mask, channels, stride_x, stride_grad,
        TAPS, HAS_BIAS, HAS_STATES_GRAD, ROWS, BLOCK_CHANNELS,
    )  # fmt: skip
    at = (segment * (TAPS - 1) + row)[:, None] * channels + channel[None, :]
    inside = mask[:, None] & (channel < channels)[None, :]
    tl.store(d_conv_states_ptr + at, d_state.to(d_conv_states_ptr.dtype.element_ty), mask=inside)
