"""What the cells show: measures of each, and the claim judged for every learning rate.

The runs of two arms are paired by their seeds and compared by the paired t-test. For each learning
rate there are two families, corrected each by itself: what the claim is about (mean reward and
forgetting, trained at once against both staged orders), and everything else. A verdict on "better"
is that of `evaluation.statistics.judge`. "At least as good" is the same test moved by the smallest
effect that matters: it holds where a loss of that size is excluded, and does not hold where any
gain is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemotron3.evaluation.seed_power import smallest_detectable_over_seeds
from nemotron3.studies.judging import judge_family, mean
from nemotron3.studies.simultaneous_rl.arms import Arm
from nemotron3.studies.simultaneous_rl.cell import CellResult, Evaluation
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL

PRIMARY_COMPARISONS = 2
"""Comparisons of the claim at one learning rate: the mean, and forgetting."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Numbers of one finished cell."""

    reward: float
    """Final mean reward of the environments."""
    worst_change: float
    """Of final minus first reward, that of the environment where it is lowest."""
    forgetting: float
    """Mean over environments of the highest reward at any evaluation minus the final one."""
    most_common_rise: float
    """Largest rise over environments of the share of the most common answer since the start."""
    without_variance: float
    """Share of rollouts in groups of equal rewards."""
    max_grad_norm: float
    """Largest gradient norm of an update."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison of simultaneous training with something else, over seeds."""

    learning_rate: float
    measure: str
    first: str
    """The arms that are compared with."""
    second: str
    """The arm that is claimed to be better."""
    is_primary: bool
    """Whether the claim is about it."""
    num_seeds: int
    """Pairs of finished cells."""
    first_mean: float
    second_mean: float
    difference: float
    """In favour of the second: positive is better for it, whatever the measure."""
    low: float
    """Of the interval of the difference, simultaneous over the family at 95%."""
    high: float
    p_value: float
    """Corrected by Holm over the family."""
    better: str
    """Verdict on "the second is better"."""
    at_least_as_good: str
    """Verdict on "the second is not worse by the smallest effect"; empty for other units."""


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    measure: str
    """A field of `Measures`."""
    sign: float
    """1 where more is better, -1 where less is."""
    first: tuple[Arm, ...]
    second: Arm
    in_rewards: bool = True
    """Whether the smallest effect, which is one of mean reward, applies."""


_STAGED = (Arm.STAGED, Arm.STAGED_REVERSED)


def _against(
    first: tuple[Arm, ...], second: Arm, measure: str, *, sign: float = 1, in_rewards: bool = True
) -> _Comparison:
    return _Comparison(
        measure=measure, sign=sign, first=first, second=second, in_rewards=in_rewards
    )


_PRIMARY = (
    _against(_STAGED, Arm.SIMULTANEOUS, "reward"),
    _against(_STAGED, Arm.SIMULTANEOUS, "forgetting", sign=-1),
)
_SECONDARY = (
    _against(_STAGED, Arm.SIMULTANEOUS, "worst_change"),
    _against(_STAGED, Arm.SIMULTANEOUS, "most_common_rise", sign=-1, in_rewards=False),
    _against(_STAGED, Arm.SIMULTANEOUS, "max_grad_norm", sign=-1, in_rewards=False),
    _against((Arm.REPLAY,), Arm.SIMULTANEOUS, "reward"),
    _against((Arm.REPLAY,), Arm.SIMULTANEOUS, "forgetting", sign=-1),
    _against((Arm.SIMULTANEOUS,), Arm.CURRICULUM, "reward"),
)
assert len(_PRIMARY) == PRIMARY_COMPARISONS


def measures_of(cell: CellResult) -> Measures:
    """The numbers of a cell that has come to its end."""
    assert cell.failure is None
    first, final = cell.evaluations[0].scores, cell.evaluations[-1].scores

    def highest(name: str) -> float:
        return max(each.scores[name].reward for each in cell.evaluations)

    return Measures(
        reward=cell.evaluations[-1].mean,
        worst_change=min(final[name].reward - first[name].reward for name in first),
        forgetting=sum(highest(name) - final[name].reward for name in first) / len(first),
        most_common_rise=max(final[name].most_common - first[name].most_common for name in first),
        without_variance=cell.without_variance,
        max_grad_norm=max(cell.grad_norms),
    )


def findings_of(study: SimultaneousRL, cells: Sequence[CellResult]) -> list[Finding]:
    """Every comparison at every learning rate; failed cells are in none."""
    found: list[Finding] = []
    for rate in study.learning_rates:
        measured = {
            (done.cell.arm, done.cell.seed): measures_of(done)
            for done in cells
            if done.cell.learning_rate == rate and done.failure is None
        }
        for family, is_primary in ((_PRIMARY, True), (_SECONDARY, False)):
            found += _family(study, rate, family, measured, is_primary=is_primary)
    return found


def _family(
    study: SimultaneousRL,
    rate: float,
    family: Sequence[_Comparison],
    measured: Mapping[tuple[Arm, int], Measures],
    *,
    is_primary: bool,
) -> list[Finding]:
    pairs = {comparison: _pairs(comparison, measured) for comparison in family}
    margin = study.smallest_effect
    better = judge_family(pairs, smallest_effect=margin)
    as_good = judge_family(pairs, smallest_effect=margin, margin=margin)
    return [
        Finding(
            learning_rate=rate,
            measure=comparison.measure,
            first=" and ".join(comparison.first),
            second=comparison.second,
            is_primary=is_primary,
            num_seeds=judged.num_seeds,
            first_mean=comparison.sign * judged.first,
            second_mean=comparison.sign * judged.second,
            difference=judged.difference,
            low=judged.low,
            high=judged.high,
            p_value=judged.p_value,
            better=judged.verdict,
            at_least_as_good=as_good[comparison].verdict if comparison.in_rewards else "",
        )
        for comparison, judged in better.items()
    ]


def _pairs(
    comparison: _Comparison, measured: Mapping[tuple[Arm, int], Measures]
) -> tuple[list[float], list[float]]:
    """Values of the seeds that have all arms; more is better, and of several arms the mean."""
    first: list[float] = []
    second: list[float] = []
    for seed in sorted({seed for _, seed in measured}):
        needed = [(arm, seed) for arm in (*comparison.first, comparison.second)]
        if not all(key in measured for key in needed):
            continue
        *some, last = (
            comparison.sign * getattr(measured[key], comparison.measure) for key in needed
        )
        first.append(mean(some))
        second.append(last)
    return first, second


@dataclass(frozen=True, kw_only=True)
class SmallestEffect:
    """What the comparisons of the claim can see, stated before any cell is trained."""

    deviations: float | None
    """The smallest difference found with probability 0.8, in standard deviations over seeds of the
    difference; None for one seed, which shows none."""
    sampling_deviation: float
    """Standard deviation of the difference in mean reward that the sampling of held-out tasks alone
    causes. Seeds add theirs, which nobody knows beforehand."""

    @property
    def at_least(self) -> float | None:
        """The smallest difference in mean reward, if seeds added nothing: it is not less."""
        return None if self.deviations is None else self.deviations * self.sampling_deviation


def smallest_effect(num_seeds: int, start: Evaluation) -> SmallestEffect:
    """What so many seeds can show, given the rewards of the model that cells start from."""
    count = len(start.scores)
    variance = sum(
        score.reward * (1 - score.reward) / score.num_tasks for score in start.scores.values()
    )
    # One arm against the mean of two: 1 + 1/2 variances of a mean over the environments.
    return SmallestEffect(
        deviations=None
        if num_seeds < 2
        else smallest_detectable_over_seeds(num_seeds, num_comparisons=PRIMARY_COMPARISONS),
        sampling_deviation=math.sqrt(1.5 * variance) / count,
    )
