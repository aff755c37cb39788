"""The products of a model with its weights: the one place that depends on the number format.

All dense and grouped products go through here, those of the router and the output layer included,
in forward passes, backward passes and recorded steps. A weight is a tensor, cast to the dtype of
the activations where its product cannot read it as it is, or a `QuantizedWeight`, which names its
own kernels (ops/weights). Of a `ComputedWeight`, such as one with an adapter, they take the
operand: its value, or a quantized weight and its low-rank change, which are multiplied apart. In
training with few bits a product also has a quantization, which rounds its operands
(ops/low_precision).
"""

from collections.abc import Sequence
from typing import overload

from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.experts import Activation, routed_experts
from nemotron3.ops.linear import linear, linear_low_rank, linear_parts
from nemotron3.ops.low_precision import ExpertsQuantization, ProductQuantization
from nemotron3.ops.weights import ComputedWeight, LowRankWeight, Weight, is_read_as_stored

AnyWeight = Weight | ComputedWeight


@overload
def dense(
    x: Tensor, weight: AnyWeight, *, quantization: ProductQuantization | None = None
) -> Tensor: ...


@overload
def dense(
    x: Tensor,
    weight: AnyWeight,
    sizes: Sequence[int],
    *,
    quantization: ProductQuantization | None = None,
) -> tuple[Tensor, ...]: ...


def dense(
    x: Float[Tensor, "*batch d_in"],
    weight: AnyWeight,
    sizes: Sequence[int] | None = None,
    *,
    quantization: ProductQuantization | None = None,
) -> Float[Tensor, "*batch d_out"] | tuple[Float[Tensor, "*batch d_part"], ...]:
    """x W^T in the dtype of `x`; with `sizes`, split into parts of these numbers of columns."""
    operand = _operand(weight, x, is_rounded=quantization is not None)
    if isinstance(operand, LowRankWeight):
        assert quantization is None, "a model with quantized weights is not trained in few bits"
        y = linear_low_rank(x, operand)
        return y if sizes is None else y.split(sizes, dim=-1)
    if sizes is None:
        return linear(x, operand, quantization=quantization)
    return linear_parts(x, operand, sizes, quantization=quantization)


def grouped(
    x: Float[Tensor, "tokens d_in"],
    indices: Int[Tensor, "tokens choice"],
    weights: Float[Tensor, "tokens choice"],
    up: AnyWeight,
    down: AnyWeight,
    *,
    activation: Activation,
    quantization: ExpertsQuantization | None = None,
) -> Float[Tensor, "tokens d_in"]:
    """Weighted sum of each token's experts, in the dtype of `x` (`ops.experts`)."""
    is_rounded = quantization is not None
    matrices = _operand(up, x, is_rounded=is_rounded), _operand(down, x, is_rounded=is_rounded)
    return routed_experts(
        x, indices, weights, *matrices, activation=activation, quantization=quantization
    )


def _operand(weight: AnyWeight, x: Tensor, *, is_rounded: bool) -> Weight | LowRankWeight:
    """The weight as the product takes it; one that a recipe rounds has the dtype of `x` before."""
    if isinstance(weight, Tensor):
        is_right = not is_rounded and is_read_as_stored(weight, x)
        return weight if is_right else weight.to(x.dtype)
    return weight.operand(x.dtype) if isinstance(weight, ComputedWeight) else weight
