"""The entry points of the routed experts and their activations."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Implementations, Kernel, choose, load, resolve
from nemotron3.ops.checks import (
    check_axes,
    check_divides,
    check_indices,
    check_operand,
    check_positive,
    check_shape,
    check_weight,
    without_tokens,
)
from nemotron3.ops.experts import activations, dequantized
from nemotron3.ops.experts.activations import Activation, up_factor
from nemotron3.ops.experts.low_rank import low_rank_implementations
from nemotron3.ops.low_precision import ExpertsQuantization
from nemotron3.ops.nvfp4 import BLOCK
from nemotron3.ops.weights import ActivationFormat, LowRankWeight, QuantizedWeight, Weight
from nemotron3.ops.weights.integer import expert_products, refuse_gradients

__all__ = ["Activation", "activate", "routed_experts"]

_NARROW = {
    "reference": dequantized.routed_experts_narrow_reference,
    "torch": dequantized.routed_experts_narrow_torch,
    "native": Kernel("nemotron3.ops.experts.native", "routed_experts_narrow_native"),
    "triton": dequantized.routed_experts_narrow_triton,
}
"""Of float32 with bfloat16 matrices."""
_WIDE = {**_NARROW, "native": dequantized.PLAIN["native"]}
"""Of bfloat16 with float32 matrices, which are rounded as they are read."""
_QUANTIZED = {
    "reference": Kernel("nemotron3.ops.experts.quantized", "routed_experts_quantized_reference"),
    "torch": Kernel("nemotron3.ops.experts.quantized", "routed_experts_quantized_torch"),
}
_COMPILED = {
    **_QUANTIZED,
    "native": Kernel("nemotron3.ops.experts.native_quantized", "routed_experts_quantized_native"),
}
_ACTIVATIONS = {
    "reference": activations.activate,
    "torch": activations.activate,
    "native": Kernel("nemotron3.ops.experts.native", "activate_native", native.FLOATS),
}


def activate(
    h: Float[Tensor, "*batch up_width"], activation: Activation, *, backend: Backend = "auto"
) -> Float[Tensor, "*batch width"]:
    """The hidden units of an expert or a dense layer from its first product."""
    if h.dim() == 0 or not h.is_floating_point():
        check_axes("activation", "h", h, "tokens up_width")
    check_divides("activation", "halves", up_factor(activation), "columns", h.shape[-1])
    check_positive("activation", columns=h.shape[-1])
    return resolve("activation", backend, _ACTIVATIONS, h)(h, activation)


def routed_experts(
    x: Float[Tensor, "tokens d_in"],
    indices: Int[Tensor, "tokens choice"],
    weights: Float[Tensor, "tokens choice"],
    up: Weight | LowRankWeight,
    down: Weight | LowRankWeight,
    *,
    activation: Activation,
    quantization: ExpertsQuantization | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "tokens d_in"]:
    """Weighted sum of each token's chosen experts, `down act(up x)`.

    `up` is [expert, up_width, d_in] and `down` [expert, d_in, width]; both are quantized in one
    format, with or without a low-rank change, or both have the dtype of `x`. Beside float32 they
    may also be bfloat16, and beside bfloat16 float32: they are cast, and gradients are not. With
    `swiglu`, `up` holds the gate's rows and then the value's, so `up_width` is twice
    `width`. `weights` is cast to the dtype of `x`, or stays float32 beside bfloat16 where compiled
    code reads it. An expert may be chosen by no token. With
    `quantization` the operands of all products are rounded (ops/low_precision), of tensors as
    weights. Raises OperandError for operands that do not fit and, on the CPU, OperandIndexError for
    an expert out of range.
    """
    check_axes("experts", "x", x, "tokens d_in")
    check_weight("experts", "down", down, "expert d_in width", x)
    check_weight("experts", "up", up, "expert up_width d_in", x)
    (tokens, d_in), (experts, _, width) = x.shape, down.shape
    check_positive("experts", experts=experts, d_in=d_in, width=width)
    check_shape("experts", "up", up, (experts, up_factor(activation) * width, d_in))
    check_shape("experts", "down", down, (experts, d_in, width))
    check_axes("experts", "weights", weights, "tokens choice")
    shape = (tokens, weights.shape[1])
    check_operand("experts", "weights", weights, shape, x, same_dtype=False)
    check_positive("experts", choices=shape[1])
    indices = check_indices("experts", "indices", indices, shape, x, (0, experts))
    if not tokens:
        return without_tokens(x, weights, *_trained(up), *_trained(down))
    if quantization is not None:
        _check_tensors(up, down)
        formats = quantization.up.formats
        is_compiled = formats.is_compiled and not (d_in % BLOCK or width % BLOCK)
        implementations = _COMPILED if is_compiled else _QUANTIZED
        return resolve("quantized experts", backend, implementations, x)(
            x, indices, weights.to(x.dtype), up, down, activation, quantization
        )
    implementations = _implementations(x, weights, up, down)
    chosen = choose("experts", backend, implementations, x)
    weights = weights.to(torch.float32 if chosen == "native" else x.dtype)
    return load(implementations, chosen)(x, indices, weights, up, down, activation)


def _trained(weight: Weight | LowRankWeight) -> tuple[Tensor, ...]:
    if isinstance(weight, LowRankWeight):
        return weight.A, weight.B
    return (weight,) if isinstance(weight, Tensor) else ()


def _check_tensors(*matrices: Weight | LowRankWeight) -> None:
    for matrix in matrices:
        if not isinstance(matrix, Tensor):
            raise OperandError(
                f"experts: a weight is {matrix.format}, and its products are to be quantized; the "
                "weights of such products are tensors of float32 or bfloat16"
            )


def _implementations(
    x: Tensor, weights: Tensor, up: Weight | LowRankWeight, down: Weight | LowRankWeight
) -> Implementations:
    if isinstance(up, Tensor) and isinstance(down, Tensor):
        if up.dtype == down.dtype == x.dtype:
            return dequantized.PLAIN
        return _NARROW if x.dtype == torch.float32 else _WIDE
    if not isinstance(up, Tensor) and not isinstance(down, Tensor) and up.format == down.format:
        if (rounds := _rounds(up)) != _rounds(down):
            raise OperandError(
                f"experts: products with up round their activations to {rounds}, and those with "
                f"down to {_rounds(down)}; expected one format"
            )
        refuse_gradients(
            "experts", getattr(up, "base", up), x, weights, *_trained(up), *_trained(down)
        )
        if isinstance(up, QuantizedWeight) and isinstance(down, QuantizedWeight):
            return expert_products(up)
        return low_rank_implementations(x, weights, up, down)
    kinds = [getattr(t, "format", "plain") for t in (up, down)]
    raise OperandError(f"experts: up is {kinds[0]} and down {kinds[1]}; expected one format")


def _rounds(weight: Weight | LowRankWeight) -> ActivationFormat | None:
    """What products with it round their activations to."""
    base = weight.base if isinstance(weight, LowRankWeight) else weight
    return None if isinstance(base, Tensor) else base.activations
