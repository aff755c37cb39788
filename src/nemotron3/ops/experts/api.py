"""The entry point of the routed experts."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.experts import activations
from nemotron3.ops.experts.activations import Activation
from nemotron3.ops.experts.reference import routed_experts_reference
from nemotron3.ops.experts.torch import routed_experts_torch

__all__ = ["Activation", "activate", "routed_experts"]

_EXPERTS = {
    "reference": routed_experts_reference,
    "torch": routed_experts_torch,
    "native": Kernel("nemotron3.ops.experts.native", "routed_experts_native"),
    "triton": Kernel("nemotron3.ops.experts.triton", "routed_experts_triton"),
}
_ACTIVATIONS = {
    "reference": activations.activate,
    "torch": activations.activate,
    "native": Kernel("nemotron3.ops.experts.native", "activate_native"),
}


def activate(
    h: Float[Tensor, "*batch up_width"], activation: Activation, *, backend: Backend = "auto"
) -> Float[Tensor, "*batch width"]:
    """The hidden units of an expert or a dense layer from its first product."""
    return resolve("activation", backend, _ACTIVATIONS, h)(h, activation)


def routed_experts(
    x: Float[Tensor, "tokens d_in"],
    indices: Int[Tensor, "tokens choice"],
    weights: Float[Tensor, "tokens choice"],
    up: Float[Tensor, "expert up_width d_in"],
    down: Float[Tensor, "expert d_in width"],
    *,
    activation: Activation,
    backend: Backend = "auto",
) -> Float[Tensor, "tokens d_in"]:
    """Weighted sum of each token's chosen experts, `down act(up x)`.

    With `swiglu` the first matrix holds the gate's rows and then the value's, so `up_width` is
    twice `width`. `weights` is cast to the dtype of `x`. An expert may be chosen by no token at
    all.
    """
    return resolve("experts", backend, _EXPERTS, x)(
        x, indices, weights.to(x.dtype), up, down, activation
    )
