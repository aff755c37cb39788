"""What is decided and said before the first cell: how many updates, the cost, what can be seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from nemotron3.data import Corpus
from nemotron3.evaluation.seed_power import smallest_detectable_over_seeds
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.studies.nvfp4.arms import EVALUATIONS, Arm, Cell
from nemotron3.studies.nvfp4.cell import CellResult, run_cell
from nemotron3.studies.nvfp4.config import LEAST_STEPS, NVFP4Study
from nemotron3.studies.study import counted, duration, timed_run

_TIMED_UPDATES = LEAST_STEPS
_LEAST_STEPS_OF_A_SEED = 40
"""Updates of a cell below which one seed less is better than still shorter cells."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What this machine needs, measured before the first cell, in as many processes at once as
    will train cells."""

    update_s: dict[str, float]
    """An update of each arm; of one that changes its precision, before the change."""
    evaluation_s: dict[str, float]
    """Held-out text once in the precision of each arm, and a checkpoint."""
    run_s: float
    """Start and end of a cell."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What stays as it is when the study goes on."""

    steps: int
    """Updates of a cell."""
    num_seeds: int
    jobs: int
    """Cells that are trained at once."""
    expected_s: float
    """Wall time of all cells."""
    smallest_effect: float | None
    """The smallest difference in loss that a comparison with the baseline finds with probability
    0.8, in standard deviations over seeds of the difference; None for one seed."""


def measure_timing(study: NVFP4Study, corpus: Corpus, work: Path) -> Timing:
    """Make a few updates of every arm; the first run of all is not counted, since it builds what
    later ones find built."""
    _timed(study, Arm.RECIPE, corpus, work)
    update_s: dict[str, float] = {}
    evaluation_s: dict[str, float] = {}
    run_s = 0.0
    for arm in Arm:
        whole, ends = _timed(study, arm, corpus, work)
        # An update that is not first, and after which nothing is evaluated: most are such.
        gaps = sorted(b - a for a, b in pairwise(ends))
        update_s[arm] = gaps[len(gaps) // 3]
        evaluation_s[arm] = gaps[-1] - update_s[arm]
        run_s = max(run_s, whole - (ends[-1] - ends[0]) - update_s[arm])
    return Timing(update_s=update_s, evaluation_s=evaluation_s, run_s=run_s)


def slowest(timings: list[Timing]) -> Timing:
    """That of the process that takes longest for an update of the recipe."""
    return max(timings, key=lambda timing: timing.update_s[Arm.RECIPE])


def _timed(study: NVFP4Study, arm: Arm, corpus: Corpus, work: Path) -> tuple[float, list[float]]:
    """Seconds of a cell of a few updates, and when each of them ended."""
    cell = Cell(arm=arm, seed=0)

    def execute(clock: RunCallback) -> CellResult:
        return run_cell(study, cell, steps=_TIMED_UPDATES, corpus=corpus, work=work, callback=clock)

    return timed_run(execute, work)


def make_plan(study: NVFP4Study, timing: Timing, *, jobs: int) -> Plan:
    """Decide the number of updates, and of seeds where there is a budget."""
    steps, num_seeds = study.steps, study.num_seeds
    if steps is None:
        steps, num_seeds = _fitting(study, timing, jobs)
    comparisons = len(Arm) - 1
    return Plan(
        steps=steps,
        num_seeds=num_seeds,
        jobs=jobs,
        expected_s=_study_s(timing, steps, num_seeds, jobs),
        smallest_effect=None
        if num_seeds < 2
        else smallest_detectable_over_seeds(num_seeds, num_comparisons=comparisons),
    )


def _fitting(study: NVFP4Study, timing: Timing, jobs: int) -> tuple[int, int]:
    """Updates and seeds that fit the budget: rather fewer seeds than cells of few updates."""
    assert study.budget_s is not None
    for num_seeds in range(study.num_seeds, 0, -1):
        fixed = _study_s(timing, 0, num_seeds, jobs)
        an_update = _study_s(timing, 1, num_seeds, jobs) - fixed
        steps = int((study.budget_s - fixed) / an_update)
        if steps >= _LEAST_STEPS_OF_A_SEED:
            return steps, num_seeds
    return max(LEAST_STEPS, steps), 1


def _study_s(timing: Timing, steps: int, num_seeds: int, jobs: int) -> float:
    return sum(cell_s(timing, arm, steps) for arm in Arm) * num_seeds / jobs


def cell_s(timing: Timing, arm: Arm, steps: int) -> float:
    """Seconds that a cell is expected to take."""
    return steps * timing.update_s[arm] + EVALUATIONS * timing.evaluation_s[arm] + timing.run_s


def statement(study: NVFP4Study, timing: Timing, plan: Plan) -> list[str]:
    """The plan in words, with its cost and the smallest effect that it can show."""
    training = study.run.training
    times = ", ".join(f"{timing.update_s[arm]:.2f} s ({arm})" for arm in _told(timing.update_s))
    lines = [
        f"{len(Arm) * plan.num_seeds} cells: {len(Arm)} arms x "
        f"{counted(plan.num_seeds, 'seed')}, each {plan.steps} updates of "
        f"{training.batch_size} x {training.seq_len} tokens",
        f"An update takes {times} here, an evaluation up to "
        f"{max(timing.evaluation_s.values()):.1f} s, a cell's start and end up to "
        f"{timing.run_s:.1f} s, with {counted(plan.jobs, 'cell')} at once: about "
        f"{duration(plan.expected_s)} in all",
        seen(plan),
    ]
    if study.budget_s is not None and plan.expected_s > study.budget_s:
        lines.append(
            f"This machine is too slow for {duration(study.budget_s)}: the least is one seed and "
            f"{LEAST_STEPS} updates"
        )
    return lines


def _told(update_s: Mapping[str, float]) -> list[str]:
    """The baseline, the recipe, and the slowest arm."""
    slowest_arm = max(update_s, key=lambda arm: update_s[arm])
    return list(dict.fromkeys([Arm.BASELINE.value, Arm.RECIPE.value, slowest_arm]))


def seen(plan: Plan) -> str:
    """What the plan's seeds can show, in words."""
    if plan.smallest_effect is None:
        return (
            "One seed shows what happened once; no difference can be told from it. Two or more are "
            "compared by a test"
        )
    return (
        f"With {plan.num_seeds} seeds a difference to the baseline is found with probability 0.8 "
        f"if it is {plan.smallest_effect:.1f} standard deviations of the difference over seeds: "
        f"{plan.smallest_effect * 0.002:.1%} of the loss if paired trainings differ by 0.2%, which "
        "the study measures"
    )
