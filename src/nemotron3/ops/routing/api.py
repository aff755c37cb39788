"""The door to the choice of experts."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
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
    chosen = resolve("route", backend, _ROUTES, logits)
    return chosen(logits, bias, choices=choices, scoring=scoring, normalise=normalise, scale=scale)
