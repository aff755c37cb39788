"""The entry point of the cross-entropy of the output layer."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.cross_entropy.reference import linear_cross_entropy_reference
from nemotron3.ops.cross_entropy.torch import linear_cross_entropy_torch

_LOSSES = {
    "reference": linear_cross_entropy_reference,
    "torch": linear_cross_entropy_torch,
    "native": Kernel("nemotron3.ops.cross_entropy.native", "linear_cross_entropy_native"),
    "triton": Kernel("nemotron3.ops.cross_entropy.triton", "linear_cross_entropy_triton"),
}


class TokenLosses(NamedTuple):
    """What the output layer says of a stream of tokens."""

    total: Float[Tensor, ""]
    """Sum of loss times token weight, in nats: the part that carries gradients."""
    per_token: Float[Tensor, " tokens"]
    """Loss of every token, in nats, detached and unweighted."""
    correct: Bool[Tensor, " tokens"]
    """Whether the most probable token was the target."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"],
    *,
    max_logits: int | None = None,
    backend: Backend = "auto",
) -> TokenLosses:
    """Cross-entropy of softmax(hidden weight^T) against `targets`, each token with its own weight.

    A token that should not count has weight 0 and any valid target. At most `max_logits` logits
    exist at a time; None leaves the number to the backend: what a CPU's cache holds, or a small
    share of a GPU's memory. `token_weights` carries no gradient.
    """
    return TokenLosses(
        *resolve("cross_entropy", backend, _LOSSES, hidden)(
            hidden, weight, targets, token_weights, max_logits
        )
    )
