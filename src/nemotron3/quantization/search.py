"""A format for each matrix under a budget of bits per element.

Each matrix stays as it is or has one of the candidate formats, and the expected KL divergence is
the sum over matrices. The search begins with the plain model and always takes the step that costs
least divergence per bit that it saves, until the budget is kept. Of each matrix only formats on the
lower convex hull of (bits, divergence) are steps, which makes the path optimal at every budget that
it passes exactly, and within one step of optimal between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.weights import WeightFormat
from nemotron3.quantization.sensitivity import Sensitivity


@dataclass(frozen=True, kw_only=True)
class FrontierPoint:
    """A model on the path from plain weights to the fewest bits."""

    bits_per_element: float
    """Of all parameters."""
    kl: float
    """Expected divergence in nats per token."""


@dataclass(frozen=True)
class _Step:
    """Replacing the format of some matrices by one of fewer bits."""

    to: Sensitivity
    saved_bits: float
    added_kl: float

    @property
    def price(self) -> float:
        """Divergence for each bit that is saved."""
        return self.added_kl / self.saved_bits


def search(
    model: LanguageModel, found: Sequence[Sensitivity], bits_per_element: float
) -> tuple[dict[str, WeightFormat], list[FrontierPoint]]:
    """Formats by parameter name, and the whole frontier, plain model first.

    Raises ConfigError for a budget that the fewest bits exceed.
    """
    elements = sum(p.numel() for p in model.parameters())
    formats: dict[str, WeightFormat] = {}
    points, steps = _path(model, _steps(model, found))
    for point, step in zip(points, steps, strict=False):
        if point.bits_per_element * elements > bits_per_element * elements:
            formats |= dict.fromkeys(step.to.matrices, step.to.format)
    if points[-1].bits_per_element > bits_per_element:
        raise ConfigError(
            f"is {bits_per_element:g}, and the fewest bits per element of this model are "
            f"{points[-1].bits_per_element:.3f}: embedding, output layer, MTP block and what no "
            "format fits stay as they are",
            field="bits",
        )
    return formats, points


def frontier_of_experts(model: LanguageModel, found: Sequence[Sensitivity]) -> list[FrontierPoint]:
    """What could be reached if each expert of a layer had a format of its own."""
    return _path(model, _steps(model, found, are_apart=True))[0]


def expected_kl(frontier: Sequence[FrontierPoint], bits_per_element: float) -> float:
    """That of the first point with at most so many bits."""
    return next(p.kl for p in frontier if p.bits_per_element <= bits_per_element)


def _path(model: LanguageModel, steps: Sequence[_Step]) -> tuple[list[FrontierPoint], list[_Step]]:
    """The steps in the order of their price, the first point before them and one after each."""
    elements = sum(p.numel() for p in model.parameters())
    bits = float(sum(8 * p.nbytes for p in model.parameters()))
    kl, ordered = 0.0, sorted(steps, key=lambda step: step.price)
    points = [FrontierPoint(bits_per_element=bits / elements, kl=0.0)]
    for step in ordered:
        bits, kl = bits - step.saved_bits, kl + step.added_kl
        points.append(FrontierPoint(bits_per_element=bits / elements, kl=kl))
    return points, ordered


def _steps(
    model: LanguageModel, found: Sequence[Sensitivity], *, are_apart: bool = False
) -> list[_Step]:
    """The steps along the convex hull of whatever has a format of its own: a matrix, the experts of
    a layer, or each of these where they `are_apart`."""
    options: dict[tuple[str, ...], list[Sensitivity]] = {}
    for each in found:
        options.setdefault(each.matrices, []).append(each)
    steps: list[_Step] = []
    for matrices, given in options.items():
        plain = float(sum(8 * model.get_parameter(name).nbytes for name in matrices))
        if not are_apart or not given[0].expert_kl:
            steps += _hull(plain, [(option, float(option.bits), option.kl) for option in given])
            continue
        experts = len(given[0].expert_kl)
        for expert in range(experts):
            own = [(each, each.bits / experts, each.expert_kl[expert]) for each in given]
            steps += _hull(plain / experts, own)
    return steps


def _hull(bits: float, options: Sequence[tuple[Sensitivity, float, float]]) -> list[_Step]:
    """Each step is cheaper than the one after it; options have bits and divergence."""
    kl, steps = 0.0, list[_Step]()
    while cheaper := [option for option in options if option[1] < bits]:
        to, fewer, more = min(cheaper, key=lambda option: (option[2] - kl) / (bits - option[1]))
        steps.append(_Step(to, bits - fewer, more - kl))
        bits, kl = fewer, more
    return steps
