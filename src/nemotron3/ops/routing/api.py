"""The door to the choice of experts."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.errors import OperandError
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_axes, check_operand
from nemotron3.ops.routing.reference import Scoring, route_reference

__all__ = ["Scoring", "route"]

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
    backend: Backend = "auto",
) -> tuple[
    Int[Tensor, "tokens choice"], Float[Tensor, "tokens choice"], Float[Tensor, "tokens expert"]
]:
    """Each token's `choices` experts, their weights, and the scores of all.

    `bias` only selects. With `normalise` the weights of a token add up to `scale`.
    """
    check_axes("route", "logits", logits, "tokens expert")
    experts = logits.shape[1]
    check_operand("route", "bias", bias, (experts,), logits, same_dtype=False)
    if not 1 <= choices <= experts:
        raise OperandError(f"route: choices is {choices}; expected 1 to {experts}, the experts")
    if scoring not in ("sigmoid", "softmax"):
        raise ValueError(f"route: scoring is {scoring!r}; choose from sigmoid, softmax")
    chosen = resolve("route", backend, _ROUTES, logits, bias)
    return chosen(logits, bias, choices=choices, scoring=scoring, normalise=normalise, scale=scale)
