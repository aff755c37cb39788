"""What is decided and said before the first cell: how many updates, the cost, what can be seen."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from nemotron3.recipes.run_rl import rl
from nemotron3.studies.simultaneous_rl.arms import Arm, Cell, parts_of, profiling_rollouts, run_of
from nemotron3.studies.simultaneous_rl.cell import Evaluation, HeldOut
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL
from nemotron3.studies.simultaneous_rl.findings import SmallestEffect, smallest_effect
from nemotron3.studies.study import counted, duration, timed_run

_TIMED_UPDATES = 8
_LEAST_STAGE = 4
"""Updates of a stage below which one seed less is better than still shorter stages."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What this machine needs, measured before the first cell, in as many processes at once as
    will train cells."""

    start: Evaluation
    """Of the model that every cell starts from."""
    evaluation_s: float
    """Held-out tasks of all environments."""
    update_s: float
    """An update with all environments, its rollouts included."""
    run_s: float
    """Start and end of an `rl` run: reading, its own held-out tasks, writing."""


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
    smallest_effect: SmallestEffect


def measure_timing(study: SimultaneousRL, held_out: HeldOut, work: Path) -> Timing:
    """Play the held-out tasks and make a few updates, each once without taking the time.

    The first of everything in a process imports modules and builds graphs, which cells do once.
    """
    start = held_out.play(updates=0)
    started = time.perf_counter()
    held_out.play(updates=0)
    evaluation_s = time.perf_counter() - started
    _timed_run(study, 1, work)
    whole, ends = _timed_run(study, _TIMED_UPDATES, work)
    # The first update is slower than the rest, and belongs to the start of a run.
    update_s = (ends[-1] - ends[0]) / (len(ends) - 1)
    return Timing(
        start=start,
        evaluation_s=evaluation_s,
        update_s=update_s,
        run_s=max(0.0, whole - len(ends) * update_s),
    )


def _timed_run(study: SimultaneousRL, steps: int, work: Path) -> tuple[float, list[float]]:
    """Seconds that a run of so many updates takes, and when each update ended."""
    # As many updates as there are environments make one stage of the simultaneous arm.
    part = replace(parts_of(study, Arm.SIMULTANEOUS, study.num_stages)[0], steps=steps)
    run = run_of(
        study,
        part,
        0,
        cell=Cell(arm=Arm.SIMULTANEOUS, learning_rate=min(study.learning_rates), seed=0),
        model=study.run.model,
        stage=steps,
    )
    return timed_run(lambda clock: rl(run, runs=work, callback=clock), work)


def make_plan(study: SimultaneousRL, timing: Timing, *, jobs: int) -> Plan:
    """Decide the number of updates, and of seeds where there is a budget."""
    steps, num_seeds = study.steps, study.num_seeds
    if steps is None:
        steps, num_seeds = _fitting(study, timing, jobs)
    return Plan(
        steps=steps,
        num_seeds=num_seeds,
        jobs=jobs,
        expected_s=_study_s(study, timing, steps, num_seeds, jobs),
        smallest_effect=smallest_effect(num_seeds, timing.start),
    )


def _fitting(study: SimultaneousRL, timing: Timing, jobs: int) -> tuple[int, int]:
    """Updates and seeds that fit the budget: rather fewer seeds than stages of few updates."""
    assert study.budget_s is not None
    for num_seeds in range(study.num_seeds, 0, -1):
        stage = 1

        def would_take(stage: int, num_seeds: int = num_seeds) -> float:
            return _study_s(study, timing, stage * study.num_stages, num_seeds, jobs)

        while would_take(stage + 1) <= study.budget_s:
            stage += 1
        if stage >= _LEAST_STAGE:
            return stage * study.num_stages, num_seeds
    return stage * study.num_stages, 1


def _study_s(study: SimultaneousRL, timing: Timing, steps: int, num_seeds: int, jobs: int) -> float:
    arms = sum(cell_s(study, timing, arm, steps) for arm in Arm)
    return arms * len(study.learning_rates) * num_seeds / jobs


def cell_s(study: SimultaneousRL, timing: Timing, arm: Arm, steps: int) -> float:
    """Seconds that a cell is expected to take."""
    parts = parts_of(study, arm, steps)
    updates = steps + profiling_rollouts(parts) / study.run.training.batch_size
    evaluations = study.num_stages * timing.evaluation_s
    return updates * timing.update_s + evaluations + len(parts) * timing.run_s


def statement(study: SimultaneousRL, timing: Timing, plan: Plan) -> list[str]:
    """The plan in words, with its cost and the smallest effect that it can show."""
    cells = len(Arm) * len(study.learning_rates) * plan.num_seeds
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    batch = study.run.training.batch_size
    lines = [
        f"{cells} cells: {len(Arm)} arms x {counted(len(study.learning_rates), 'learning rate')} "
        f"({rates}) x {counted(plan.num_seeds, 'seed')}, each {plan.steps} updates of {batch} "
        f"rollouts in "
        f"{study.num_stages} environments",
        f"Held-out reward of {study.run.model}: {timing.start.mean:.3f}",
        f"An update takes {timing.update_s:.1f} s here, an evaluation {timing.evaluation_s:.1f} s, "
        f"a run's start and end {timing.run_s:.1f} s, with {counted(plan.jobs, 'cell')} at once: "
        f"about {duration(plan.expected_s)} in all",
        seen(plan),
    ]
    if study.budget_s is not None and plan.expected_s > study.budget_s:
        lines.append(
            f"This machine is too slow for {duration(study.budget_s)}: the least that shows "
            "anything is one seed and one update a stage"
        )
    return lines


def seen(plan: Plan) -> str:
    """What the plan's seeds can show, in words."""
    effect = plan.smallest_effect
    if effect.deviations is None or effect.at_least is None:
        return (
            "One seed shows what happened once; no claim can be told from it. Two or more are "
            "compared by a test"
        )
    return (
        f"With {plan.num_seeds} seeds a difference is found with probability 0.8 if it is "
        f"{effect.deviations:.1f} standard deviations of the difference over seeds; the sampling "
        f"of held-out tasks alone makes that about {effect.at_least:.3f} in mean reward"
    )
