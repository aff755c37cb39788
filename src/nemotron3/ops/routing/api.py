"""The entry point of routing: the choice of experts for each token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.errors import ConfigError, OperandError
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_axes, check_operand
from nemotron3.ops.routing.reference import Scoring, route_reference

__all__ = ["Scoring", "check_indices", "route"]

_ROUTES = {
    "reference": route_reference,
    "torch": route_reference,
    "native": Kernel("nemotron3.ops.routing.native", "route_native"),
}


def route(
    logits: Float[Tensor, "tokens expert"],
    bias: Float[Tensor, " expert"],
    *,
    choices: int,
    scoring: Scoring,
    normalise: bool,
    scale: float,
    indices: Int[Tensor, "tokens choice"] | None = None,
    backend: Backend = "auto",
) -> tuple[
    Int[Tensor, "tokens choice"], Float[Tensor, "tokens choice"], Float[Tensor, "tokens expert"]
]:
    """Each token's `choices` experts, their weights, and the scores of all experts.

    `bias` affects only which experts are chosen. With `normalise` the weights of a token add up to
    `scale`. With `indices` these experts are used, in this order; their weights and gradients still
    follow from `logits`.
    """
    check_axes("route", "logits", logits, "tokens expert")
    experts = logits.shape[1]
    check_operand("route", "bias", bias, (experts,), logits, same_dtype=False)
    if not 1 <= choices <= experts:
        raise OperandError(f"route: choices is {choices}; expected 1 to {experts}, the experts")
    if scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"route: scoring is {scoring!r}; choose from sigmoid, softmax")
    if indices is not None:
        check_indices(indices, tokens=len(logits), choices=choices, experts=experts)
    chosen = resolve("route", backend, _ROUTES, logits, bias)
    return chosen(
        logits, bias, indices, choices=choices, scoring=scoring, normalise=normalise, scale=scale
    )


def check_indices(
    indices: Tensor, *, tokens: int, choices: int, experts: int, name: str = "indices"
) -> None:
    """Raise ConfigError unless `indices` are `choices` different experts for each token."""
    if indices.dtype != torch.int64 or indices.shape != (tokens, choices):
        raise ConfigError(
            f"{name} is {indices.dtype} of shape {list(indices.shape)}; it must be torch.int64 of "
            f"shape [{tokens}, {choices}], the experts that each token of this call chose"
        )
    ordered = indices.sort(dim=-1).values
    wrong = (ordered < 0) | (ordered >= experts)
    wrong[:, 1:] |= ordered[:, 1:] == ordered[:, :-1]
    if wrong.any():
        row = int(wrong.any(-1).nonzero()[0])
        raise ConfigError(
            f"{name}[{row}] is {indices[row].tolist()}; it must be different experts from 0 to "
            f"{experts - 1}"
        )
