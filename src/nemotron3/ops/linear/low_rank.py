"""Dense products with a quantized weight and its low-rank change: x W^T + scale (x A^T) B^T.

The codes are multiplied as they are, and beside the result there are only the `rank` numbers of
each row. So training keeps no matrix for the backward pass, and has gradients of x, A and B alone.
"""

import torch
from torch import Tensor

from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_axes, check_operand, check_shape, check_weight
from nemotron3.ops.linear.api import linear
from nemotron3.ops.linear.reference import linear_reference
from nemotron3.ops.weights import CompiledWeight, LowRankWeight
from nemotron3.ops.weights.integer import refuse_gradients


def linear_low_rank(x: Tensor, weight: LowRankWeight, *, backend: Backend = "auto") -> Tensor:
    """The product in the dtype of `x`, in which A and B are multiplied too.

    Shapes as in `nemotron3.ops.linear.api.linear`.
    """
    if x.dim() == 0 or not x.is_floating_point():
        check_axes("linear", "x", x, "tokens d_in")
    check_weight("linear", "weight", weight, "d_out d_in", x)
    check_shape("linear", "weight", weight, (weight.shape[0], x.shape[-1]))
    d_out, d_in = weight.shape
    rank = weight.A.shape[0]
    check_operand("linear", "A", weight.A, (rank, d_in), x, same_dtype=False)
    check_operand("linear", "B", weight.B, (d_out, rank), x, same_dtype=False)
    refuse_gradients("linear", weight.base, x, weight.A, weight.B)
    has_gradients = torch.is_grad_enabled() and any(
        t.requires_grad for t in (x, weight.A, weight.B)
    )
    is_compiled = isinstance(weight.base, CompiledWeight) and not has_gradients
    implementations = _COMPILED if is_compiled else _PRODUCTS
    operands = (x, weight.A, weight.B) if is_compiled else (x,)
    return resolve("linear", backend, implementations, *operands)(x, weight)


def _reference(x: Tensor, weight: LowRankWeight) -> Tensor:
    if weight.base.activations is not None:  # what the change multiplies is not rounded
        narrow = linear_reference(x, weight.A.to(x.dtype)) * weight.scale
        change = linear_reference(narrow, weight.B.to(x.dtype))
        return linear(x, weight.base, backend="reference") + change
    return linear_reference(x, weight.dequantize(x.dtype))


def _apart(x: Tensor, weight: LowRankWeight) -> Tensor:
    narrow = linear(x, weight.A.to(x.dtype)) * weight.scale
    return linear(x, weight.base) + linear(narrow, weight.B.to(x.dtype))


_PRODUCTS = {"reference": _reference, "torch": _apart, "native": _apart}
_COMPILED = {
    **_PRODUCTS,
    "native": Kernel("nemotron3.ops.linear.native", "linear_low_rank_native", native.FLOATS),
}
