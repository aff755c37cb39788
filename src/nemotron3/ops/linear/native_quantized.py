"""Dense products with rounded operands, in C++."""

from collections.abc import Sequence

from torch import Tensor

from nemotron3.ops.linear.native import input_gradient, product, weight_gradient
from nemotron3.ops.linear.quantized import Products, linear_quantized
from nemotron3.ops.low_precision import ProductQuantization


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight.contiguous())


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    return input_gradient(dy, weight=weight.contiguous())


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return weight_gradient(dy, x=x)


NATIVE = Products(_forward, _input_gradient, _weight_gradient, "native")


def linear_quantized_native(
    x: Tensor, weight: Tensor, sizes: Sequence[int], quantization: ProductQuantization
) -> tuple[Tensor, ...]:
    """Parts of x W^T; shapes as in `nemotron3.ops.linear.api.linear_parts`."""
    return linear_quantized(x, weight, sizes, quantization, NATIVE)
