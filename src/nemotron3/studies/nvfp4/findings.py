"""What the cells show: the difference in held-out loss to the baseline, and to the recipe.

A difference is relative to the loss of the baseline with the same seed, and positive where the
loss is higher. Two measures of a cell are compared: the loss in the precision of training, as the
reports give it, and that of the finished model without rounding. For each there are two families
of comparisons over paired seeds, corrected each by itself:

    against the baseline    the claim: rounding costs loss
    against the recipe      the claim: without an ingredient the loss is higher; with a change it
                            is lower

A verdict is that of `evaluation.statistics.judge` on the claim.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nemotron3.evaluation.seed_power import smallest_detectable_over_seeds
from nemotron3.evaluation.statistics import compare_seeds
from nemotron3.studies.judging import Pairs, judge_family, mean
from nemotron3.studies.nvfp4.arms import ABLATIONS, CHANGES, Arm
from nemotron3.studies.nvfp4.cell import CellResult
from nemotron3.studies.nvfp4.config import NVFP4Study

Measure = Literal["training", "unrounded"]
MEASURES: tuple[Measure, ...] = ("training", "unrounded")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison over seeds."""

    measure: Measure
    """Held-out loss in the precision of training, or of the finished model without rounding."""
    arm: Arm
    against: Arm
    claim: Literal["higher", "lower"]
    """What the verdict is on: that the arm's loss is higher than the other's, or lower."""
    num_seeds: int
    """Pairs of finished cells."""
    difference: float
    """Mean of (arm - other) / baseline, of their losses: positive where the arm's is higher."""
    low: float
    """Of its 95% interval, by itself."""
    high: float
    family_low: float
    """Of its interval that is simultaneous over the family at 95%; the verdict uses it."""
    family_high: float
    deviation: float | None
    """Standard deviation of the difference over seeds; None for one."""
    detectable: float | None
    """The smallest difference that so many seeds with this deviation find with probability 0.8;
    None where seeds have no spread to judge by."""
    p_value: float
    """Corrected by Holm over the family."""
    verdict: str


def losses_of(cells: Sequence[CellResult], measure: Measure) -> dict[tuple[Arm, int], float]:
    """Bits per byte at the end of every finished cell, by arm and seed."""
    found: dict[tuple[Arm, int], float] = {}
    for done in cells:
        if done.failure is None:
            value = done.unrounded if measure == "unrounded" else done.bits_per_byte[-1].value
            assert value is not None
            found[done.cell.arm, done.cell.seed] = value
    return found


def findings_of(study: NVFP4Study, cells: Sequence[CellResult]) -> list[Finding]:
    """Every comparison; failed cells are in none."""
    found: list[Finding] = []
    for measure in MEASURES:
        losses = losses_of(cells, measure)
        claims: dict[Arm, int] = dict.fromkeys((Arm.RECIPE, *ABLATIONS, *CHANGES), 1)
        found += _family(study, measure, losses, claims, Arm.BASELINE)
        claims = {arm: -1 if arm in CHANGES else 1 for arm in (*ABLATIONS, *CHANGES)}
        found += _family(study, measure, losses, claims, Arm.RECIPE)
    return found


def _family(
    study: NVFP4Study,
    measure: Measure,
    losses: Mapping[tuple[Arm, int], float],
    claims: Mapping[Arm, int],
    against: Arm,
) -> list[Finding]:
    """`claims` has 1 for arms whose loss is claimed to be higher, and -1 for lower."""
    differences = {arm: relative_differences(losses, arm, against) for arm in claims}
    pairs: dict[Arm, Pairs] = {
        # Around 1, which is what the differences are relative to.
        arm: ([1.0] * len(values), [1.0 + claims[arm] * value for value in values])
        for arm, values in differences.items()
    }
    judged = judge_family(pairs, smallest_effect=study.smallest_effect)
    # In standard deviations, for each number of seeds that a comparison has.
    effects = {
        count: smallest_detectable_over_seeds(count, num_comparisons=len(claims))
        for count in {one.num_seeds for one in judged.values()}
        if count > 1
    }
    found: list[Finding] = []
    for arm, one in judged.items():
        sign, values = claims[arm], differences[arm]
        ends = sorted((sign * one.low, sign * one.high))
        low, high = _interval(values)
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found.append(
            Finding(
                measure=measure,
                arm=arm,
                against=against,
                claim="higher" if sign > 0 else "lower",
                num_seeds=one.num_seeds,
                difference=mean(values),
                low=low,
                high=high,
                family_low=ends[0],
                family_high=ends[1],
                deviation=deviation,
                detectable=None
                if deviation is None or math.isinf(low)
                else deviation * effects[one.num_seeds],
                p_value=one.p_value,
                verdict=one.verdict,
            )
        )
    return found


def relative_differences(
    losses: Mapping[tuple[Arm, int], float], arm: Arm, against: Arm
) -> list[float]:
    """Of the seeds that have both arms and the baseline, in their order."""
    seeds = sorted({seed for _, seed in losses})
    needed = (arm, against, Arm.BASELINE)
    return [
        (losses[arm, seed] - losses[against, seed]) / losses[Arm.BASELINE, seed]
        for seed in seeds
        if all((each, seed) in losses for each in needed)
    ]


def closed_share(findings: Sequence[Finding], measure: Measure, arm: Arm) -> float | None:
    """The share of the recipe's gap to the baseline that an arm closes.

    None where it cannot be told that the recipe has a gap.
    """
    gaps = {
        found.arm: found
        for found in findings
        if found.measure == measure and found.against is Arm.BASELINE
    }
    recipe, own = gaps.get(Arm.RECIPE), gaps.get(arm)
    if recipe is None or own is None or recipe.verdict != "holds":
        return None
    return 1 - own.difference / recipe.difference


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return -math.inf, math.inf
    found = compare_seeds([1.0] * len(values), [1.0 + value for value in values]).interval
    return found.low, found.high
