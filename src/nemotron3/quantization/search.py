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
    bits = float(sum(8 * p.nbytes for p in model.parameters()))
    steps = sorted(_steps(model, found), key=lambda step: step.price)
    frontier, kl = [FrontierPoint(bits_per_element=bits / elements, kl=0.0)], 0.0
    formats: dict[str, WeightFormat] = {}
    for step in steps:
        if bits > bits_per_element * elements:
            formats |= dict.fromkeys(step.to.matrices, step.to.format)
        bits, kl = bits - step.saved_bits, kl + step.added_kl
        frontier.append(FrontierPoint(bits_per_element=bits / elements, kl=kl))
    if bits > bits_per_element * elements:
        raise ConfigError(
            f"is {bits_per_element:g}, and the fewest bits per element of this model are "
            f"{bits / elements:.3f}: embedding, output layer, MTP block and what no format fits "
            "stay as they are",
            field="bits",
        )
    return formats, frontier


def _steps(model: LanguageModel, found: Sequence[Sensitivity]) -> list[_Step]:
    """The steps of every matrix along its convex hull; each is cheaper than the one after it."""
    options: dict[tuple[str, ...], list[Sensitivity]] = {}
    for each in found:
        options.setdefault(each.matrices, []).append(each)
    steps: list[_Step] = []
    for matrices, given in options.items():
        bits, kl = float(sum(8 * model.get_parameter(name).nbytes for name in matrices)), 0.0
        while cheaper := [option for option in given if option.bits < bits]:
            best = min(cheaper, key=lambda option: (option.kl - kl) / (bits - option.bits))
            steps.append(_Step(best, bits - best.bits, best.kl - kl))
            bits, kl = float(best.bits), best.kl
    return steps
