"""The door to dense products."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.linear.reference import linear_reference

_PRODUCTS = {
    "reference": linear_reference,
    "torch": F.linear,
    "native": Kernel("nemotron3.ops.linear.native", "linear_native"),
}


def linear(
    x: Float[Tensor, "*batch d_in"],
    weight: Float[Tensor, "d_out d_in"],
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch d_out"]:
    """x W^T, both of one dtype."""
    return resolve("linear", backend, _PRODUCTS, x)(x, weight)
