"""The learning rate as a pure function of the step.

A schedule holds no state, so there is nothing to save, and a resumed run cannot be off by one step.
It is a factor between 0 and 1 of the peak in the optimizer's configuration, so that one number
changes the rate. Steps are optimizer updates; the recipe, which knows the batch, converts lengths
in tokens to steps.

The formulas are Megatron's (`OptimizerParamScheduler`): linear warm-up from zero, then

    WSD       peak until `total_steps - decay_steps`, then down over `decay_steps`
              (Nemotron 3 Super and Ultra: minus_sqrt, 1 - sqrt(r), to a hundredth of the peak)
    Cosine    half a cosine over everything after the warm-up
    Constant  peak until the end

`step` counts the updates already made. With a warm-up the first update therefore has the rate zero,
as in Megatron, and step `warmup_steps` is the first at the peak.

    schedule = WSD(warmup_steps=100, decay_steps=200, total_steps=1000)
    schedule.learning_rate(900, peak=1e-3)      # halfway through the decay: 3.0e-4
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from nemotron3.errors import ConfigError

DecayShape: TypeAlias = Literal["minus_sqrt", "linear", "cosine", "exponential"]


def decay_factor(shape: DecayShape, r: float) -> float:
    """The rate at progress `r` in [0, 1], as a share of the way from minimum (0) to peak (1)."""
    match shape:
        case "minus_sqrt":
            return 1.0 - math.sqrt(r)
        case "linear":
            return 1.0 - r
        case "cosine":
            return 0.5 * (math.cos(math.pi * r) + 1.0)
        case "exponential":
            return 2.0 * math.pow(0.5, r) - 1.0


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, decay: the schedule of the Nemotron 3 pre-training runs."""

    kind: Literal["wsd"] = "wsd"
    total_steps: int
    """Step at which the decay reaches its minimum; the rate stays there afterwards."""
    warmup_steps: int
    """Steps of linear warm-up from zero to the peak."""
    decay_steps: int
    """Steps of the decay, counted back from the end."""
    decay: DecayShape = "minus_sqrt"
    """Shape of the decay; minus_sqrt falls fast at first and then slowly."""
    final_fraction: float = 0.01
    """The minimum, as a fraction of the peak."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, self.final_fraction)
        if self.decay_steps < 1:
            raise ConfigError(f"decay_steps is {self.decay_steps}; it must be 1 or more")
        if self.warmup_steps + self.decay_steps > self.total_steps:
            raise ConfigError(
                f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} do not fit "
                f"into total_steps {self.total_steps}; shorten one or train longer"
            )

    def learning_rate(self, step: int, *, peak: float) -> float:
        """The rate of the update that follows `step` updates."""
        if step <= self.warmup_steps:
            return _warmup(step, self.warmup_steps, peak)
        minimum = peak * self.final_fraction
        if step > self.total_steps:
            return minimum
        decayed = step - (self.total_steps - self.decay_steps)
        factor = decay_factor(self.decay, decayed / self.decay_steps) if decayed > 0 else 1.0
        return minimum + factor * (peak - minimum)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Warm-up, then half a cosine to the minimum."""

    kind: Literal["cosine"] = "cosine"
    total_steps: int
    """Step at which the minimum is reached; the rate stays there afterwards."""
    warmup_steps: int
    """Steps of linear warm-up from zero to the peak."""
    final_fraction: float = 0.01
    """The minimum, as a fraction of the peak."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, self.final_fraction)
        if self.warmup_steps >= self.total_steps:
            raise ConfigError(
                f"warmup_steps {self.warmup_steps} leave nothing of total_steps "
                f"{self.total_steps}; shorten the warm-up or train longer"
            )

    def learning_rate(self, step: int, *, peak: float) -> float:
        """The rate of the update that follows `step` updates."""
        if self.warmup_steps > 0 and step <= self.warmup_steps:
            return _warmup(step, self.warmup_steps, peak)
        minimum = peak * self.final_fraction
        if step > self.total_steps:
            return minimum
        r = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return minimum + decay_factor("cosine", r) * (peak - minimum)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Warm-up, then the peak rate until the end; checkpoint merging replaces the decay."""

    kind: Literal["constant"] = "constant"
    warmup_steps: int = 0
    """Steps of linear warm-up from zero to the peak."""

    def __post_init__(self) -> None:
        _check(self.warmup_steps, 1.0)

    def learning_rate(self, step: int, *, peak: float) -> float:
        """The rate of the update that follows `step` updates."""
        return _warmup(step, self.warmup_steps, peak)


Schedule: TypeAlias = WSD | Cosine | Constant


def _warmup(step: int, warmup_steps: int, peak: float) -> float:
    return peak * step / warmup_steps if step < warmup_steps else peak


def _check(warmup_steps: int, final_fraction: float) -> None:
    if warmup_steps < 0:
        raise ConfigError(f"warmup_steps is {warmup_steps}; it must be 0 or more")
    if not 0.0 <= final_fraction <= 1.0:
        raise ConfigError(f"final_fraction is {final_fraction}; it must lie between 0 and 1")
