"""The entry points of the output layer's losses."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_axes, check_indices, check_operand, check_positive
from nemotron3.ops.cross_entropy.reference import (
    linear_cross_entropy_reference,
    linear_kl_divergence_reference,
    token_logprobs_reference,
)
from nemotron3.ops.cross_entropy.torch import (
    linear_cross_entropy_torch,
    linear_kl_divergence_torch,
    token_logprobs_chunked,
)
from nemotron3.ops.weights import Weight, dequantized

_LOSSES = {
    "reference": linear_cross_entropy_reference,
    "torch": linear_cross_entropy_torch,
    "native": Kernel(
        "nemotron3.ops.cross_entropy.native", "linear_cross_entropy_native", native.FLOATS
    ),
    "triton": Kernel("nemotron3.ops.cross_entropy.triton", "linear_cross_entropy_triton"),
}


_LOGPROBS = {
    "reference": token_logprobs_reference,
    "torch": token_logprobs_chunked,
    "native": Kernel("nemotron3.ops.cross_entropy.native", "token_logprobs_native", native.FLOATS),
    "triton": Kernel("nemotron3.ops.cross_entropy.triton", "token_logprobs_triton"),
}


_DIVERGENCES = {
    "reference": linear_kl_divergence_reference,
    "torch": linear_kl_divergence_torch,
}


class TokenDivergences(NamedTuple):
    """How far a stream of tokens is from what a teacher predicts."""

    total: Float[Tensor, ""]
    """Sum of divergence times token weight, in nats: the part that carries gradients."""
    per_token: Float[Tensor, " tokens"]
    """Divergence of every token, in nats, detached and unweighted."""
    agrees: Bool[Tensor, " tokens"]
    """Whether both have the same most probable token."""


class TokenLosses(NamedTuple):
    """The losses of a stream of tokens at the output layer."""

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

    `weight` is [vocab, d_model]; a quantized one is dequantized first and gets no gradient.
    A token that should not count has weight 0 and any valid target: there is no ignore index, not
    even PyTorch's -100. A target outside the vocabulary raises OperandIndexError on the CPU; on a
    GPU, where the check would wait for the device, its loss is NaN. At most `max_logits` logits
    exist at a time; with None the backend chooses: as many as fit a CPU's cache, or a small share
    of a GPU's memory. `token_weights` gets no gradient.
    """
    weight = dequantized(weight, hidden.dtype)
    targets = _check("cross_entropy", hidden, weight, targets, max_logits)
    check_operand(
        "cross_entropy", "token_weights", token_weights, targets.shape, hidden, same_dtype=False
    )
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = resolve("cross_entropy", backend, _LOSSES, hidden)
    return TokenLosses(
        *losses(hidden, weight, targets, token_weights.detach().to(wide), max_logits)
    )


def token_logprobs(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Weight,
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    max_logits: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, " tokens"]:
    """Log-probability of each target under softmax(hidden weight^T / temperature), in nats.

    The result is float32 at least and differentiable in `hidden` and `weight`: policy gradients and
    preference losses are built on it. The whole matrix of logits never exists. Its parts are
    computed once in the forward pass and again in the backward pass; `linear_cross_entropy`, which
    knows the weight of each token beforehand, computes them once. `weight`, `targets` and
    `max_logits` are as in `linear_cross_entropy`. Raises ValueError unless `temperature` > 0.
    """
    weight = dequantized(weight, hidden.dtype)
    targets = _check("token_logprobs", hidden, weight, targets, max_logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"token_logprobs: temperature is {temperature}; expected a number above 0")
    logprobs = resolve("token_logprobs", backend, _LOGPROBS, hidden)
    return logprobs(hidden, weight, targets, temperature, max_logits)


def linear_kl_divergence(
    hidden: Float[Tensor, "tokens d_model"],
    weight: Weight,
    teacher_hidden: Float[Tensor, "tokens d_teacher"],
    teacher_weight: Weight,
    token_weights: Float[Tensor, " tokens"],
    *,
    max_logits: int | None = None,
    backend: Backend = "auto",
) -> TokenDivergences:
    """KL divergence from softmax(teacher_hidden teacher_weight^T), each token with its own weight.

    It is sum_v p (log p - log q) with the teacher's p and q of `hidden` and `weight`, in nats. Both
    weights have the same vocabulary; quantized ones are dequantized first. The teacher and
    `token_weights` get no gradients. At most `max_logits` logits of each exist at a time.
    """
    operation = "kl_divergence"
    weight = dequantized(weight, hidden.dtype)
    teacher_weight = dequantized(teacher_weight, hidden.dtype).detach().to(hidden.dtype)
    _check_layer(operation, hidden, weight, max_logits)
    check_axes(operation, "teacher_hidden", teacher_hidden, "tokens d_teacher")
    tokens, width = len(hidden), teacher_hidden.shape[1]
    check_operand(operation, "teacher_hidden", teacher_hidden, (tokens, width), hidden)
    check_operand(operation, "teacher_weight", teacher_weight, (len(weight), width), hidden)
    check_operand(operation, "token_weights", token_weights, (tokens,), hidden, same_dtype=False)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    divergences = resolve(operation, backend, _DIVERGENCES, hidden)
    return TokenDivergences(
        *divergences(
            hidden,
            weight,
            teacher_hidden.detach(),
            teacher_weight,
            token_weights.detach().to(wide),
            max_logits,
        )
    )


def _check(
    operation: str, hidden: Tensor, weight: Tensor, targets: Tensor, max_logits: int | None
) -> Tensor:
    """The targets as the backends read them."""
    _check_layer(operation, hidden, weight, max_logits)
    hint = "; a token that should not count has weight 0 and any of these"
    bounds = (0, len(weight))
    return check_indices(operation, "targets", targets, (len(hidden),), hidden, bounds, hint)


def _check_layer(operation: str, hidden: Tensor, weight: Tensor, max_logits: int | None) -> None:
    check_axes(operation, "hidden", hidden, "tokens d_model")
    check_axes(operation, "weight", weight, "vocab d_model")
    vocab, width = len(weight), hidden.shape[1]
    check_positive(operation, vocab=vocab, d_model=width)
    check_operand(operation, "weight", weight, (vocab, width), hidden, same_dtype=False)
    if max_logits is not None and max_logits < 1:
        raise ValueError(f"{operation}: max_logits is {max_logits}; expected 1 or more")
