"""The entry point of the cross-entropy of the output layer."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_axes, check_indices, check_operand, check_positive
from nemotron3.ops.cross_entropy.reference import linear_cross_entropy_reference
from nemotron3.ops.cross_entropy.torch import linear_cross_entropy_torch
from nemotron3.ops.weights import Weight, dequantized

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
    weight: Weight,
    targets: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"],
    *,
    max_logits: int | None = None,
    backend: Backend = "auto",
) -> TokenLosses:
    """Cross-entropy of softmax(hidden weight^T) against `targets`, each token with its own weight.

    `weight` is [vocab, d_model]; a quantized one is dequantized first and has no gradient.
    A token that should not count has weight 0 and any target of the vocabulary: no target, not even
    PyTorch's -100, means that a token is left out. A target outside the vocabulary is an
    OperandIndexError on the CPU; on a GPU, where nobody waits to look at it, kernels give it a loss
    of NaN. At most `max_logits` logits exist at a time; None leaves the number to the backend: what
    a CPU's cache holds, or a small share of a GPU's memory. `token_weights` carries no gradient.
    """
    check_axes("cross_entropy", "hidden", hidden, "tokens d_model")
    weight = dequantized(weight, hidden.dtype)
    check_axes("cross_entropy", "weight", weight, "vocab d_model")
    (tokens, width), vocab = hidden.shape, len(weight)
    check_positive("cross_entropy", vocab=vocab, d_model=width)
    check_operand("cross_entropy", "weight", weight, (vocab, width), hidden, same_dtype=False)
    check_operand(
        "cross_entropy", "token_weights", token_weights, (tokens,), hidden, same_dtype=False
    )
    hint = "; a token that should not count has weight 0 and any of these"
    targets = check_indices(
        "cross_entropy", "targets", targets, (tokens,), hidden, (0, vocab), hint
    )
    if max_logits is not None and max_logits < 1:
        raise ValueError(f"cross_entropy: max_logits is {max_logits}; expected 1 or more")
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = resolve("cross_entropy", backend, _LOSSES, hidden)
    return TokenLosses(
        *losses(hidden, weight, targets, token_weights.detach().to(wide), max_logits)
    )
