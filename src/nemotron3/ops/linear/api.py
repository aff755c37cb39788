"""The entry points of dense products."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Implementations, Kernel, load, resolve
from nemotron3.ops.checks import check_axes, check_shape, check_weight
from nemotron3.ops.linear.reference import linear_reference
from nemotron3.ops.low_precision import ProductQuantization
from nemotron3.ops.weights import QuantizedWeight, Weight, is_narrow
from nemotron3.ops.weights.integer import linear_products, refuse_gradients

_PRODUCTS = {
    "reference": linear_reference,
    "torch": F.linear,
    "native": Kernel("nemotron3.ops.linear.native", "linear_native", native.FLOATS),
}


def _in_parts(
    product: Callable[[Tensor, Any], Tensor], x: Tensor, weight: Weight, sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    return product(x, weight).split(sizes, dim=-1)


_NARROW = {
    "reference": Kernel("nemotron3.ops.linear.dequantized", "linear_narrow_reference"),
    "torch": Kernel("nemotron3.ops.linear.dequantized", "linear_narrow_torch"),
    "native": Kernel("nemotron3.ops.linear.native", "linear_narrow_native"),
}
"""Products of float32 with a bfloat16 weight."""
_WIDE = {**_NARROW, "native": _PRODUCTS["native"]}
"""Products of bfloat16 with a float32 weight, which is rounded as it is read."""


_PRODUCTS_IN_PARTS = {
    "reference": partial(_in_parts, linear_reference),
    "torch": partial(_in_parts, F.linear),
    "native": Kernel("nemotron3.ops.linear.native", "linear_parts_native", native.FLOATS),
}
_WIDE_IN_PARTS = {
    **{name: partial(_in_parts, load(_WIDE, name)) for name in ("reference", "torch")},
    "native": _PRODUCTS_IN_PARTS["native"],
}


_QUANTIZED = {
    "reference": Kernel("nemotron3.ops.linear.quantized", "linear_quantized_reference"),
    "torch": Kernel("nemotron3.ops.linear.quantized", "linear_quantized_torch"),
    "native": Kernel("nemotron3.ops.linear.native_quantized", "linear_quantized_native"),
}


def linear(
    x: Float[Tensor, "*batch d_in"],
    weight: Weight,
    *,
    quantization: ProductQuantization | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch d_out"]:
    """x W^T for a weight [d_out, d_in], which is quantized or has the dtype of `x`.

    Beside a float32 `x` a weight may be bfloat16, which is widened. Beside a bfloat16 `x` it may be
    float32: it is rounded for the product, and its gradient is not.

    With `quantization` the operands of the product and of its gradients are rounded
    (ops/low_precision); the weight is then a tensor.
    """
    _check(x, weight)
    if quantization is not None:
        sizes = [weight.shape[0]]
        return _quantized(x, weight, sizes, quantization, backend)[0]
    return resolve("linear", backend, _products(x, weight), x)(x, weight)


def linear_parts(
    x: Float[Tensor, "*batch d_in"],
    weight: Weight,
    sizes: Sequence[int],
    *,
    quantization: ProductQuantization | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "*batch d_part"], ...]:
    """x W^T, split into columns of `sizes`; the gradients of the parts are never concatenated."""
    _check(x, weight)
    if sum(sizes) != weight.shape[0] or min(sizes, default=0) < 0:
        raise OperandError(
            f"linear: sizes {list(sizes)} do not make up the {weight.shape[0]} rows of weight"
        )
    if quantization is not None:
        return _quantized(x, weight, sizes, quantization, backend)
    if isinstance(weight, QuantizedWeight) or is_narrow(weight, x):
        return _in_parts(resolve("linear", backend, _products(x, weight), x), x, weight, sizes)
    parts = _PRODUCTS_IN_PARTS if weight.dtype == x.dtype else _WIDE_IN_PARTS
    return resolve("linear", backend, parts, x)(x, weight, sizes)


def _products(x: Tensor, weight: Weight) -> Implementations:
    if isinstance(weight, QuantizedWeight):
        return linear_products(weight)
    if weight.dtype == x.dtype:
        return _PRODUCTS
    return _NARROW if is_narrow(weight, x) else _WIDE


def _quantized(
    x: Tensor,
    weight: Weight,
    sizes: Sequence[int],
    quantization: ProductQuantization,
    backend: Backend,
) -> tuple[Tensor, ...]:
    if not isinstance(weight, Tensor):
        raise OperandError(
            f"linear: weight is {weight.format}, and its product is to be quantized; the weight "
            "of such a product is a tensor of float32 or bfloat16"
        )
    return resolve("quantized linear", backend, _QUANTIZED, x)(x, weight, sizes, quantization)


def _check(x: Tensor, weight: Weight) -> None:
    if isinstance(weight, Tensor) and _are_right(x, weight):
        return
    if x.dim() == 0 or not x.is_floating_point():
        check_axes("linear", "x", x, "tokens d_in")
    check_weight("linear", "weight", weight, "d_out d_in", x)
    refuse_gradients("linear", weight, x)
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))


def _are_right(x: Tensor, weight: Tensor) -> bool:
    """All checks of two tensors at once, since this operation is called more than any other."""
    return (
        x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and x.dtype == weight.dtype
        and x.is_floating_point()
        and x.device == weight.device
    )
