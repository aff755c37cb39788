"""Carries the study out: timing, the plan and its cost, the cells, and the pages."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from nemotron3.environments.registry import load_environment
from nemotron3.environments.rows import Split
from nemotron3.errors import ConfigError
from nemotron3.models.huggingface.companions import CONFIG_FILE
from nemotron3.recipes.input_files import model_files, record_input_files
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_lock import holds_folder
from nemotron3.studies.jobs import Execute, number_of_jobs, side_by_side
from nemotron3.studies.simultaneous_rl.arms import Arm, Cell
from nemotron3.studies.simultaneous_rl.cell import CellResult, Evaluation, HeldOut, run_cell
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL
from nemotron3.studies.simultaneous_rl.findings import findings_of
from nemotron3.studies.simultaneous_rl.page import as_markdown, write_study_page
from nemotron3.studies.simultaneous_rl.plan import (
    Plan,
    Timing,
    cell_s,
    make_plan,
    measure_timing,
    statement,
)
from nemotron3.studies.simultaneous_rl.result import StudyResult
from nemotron3.studies.study import (
    Updates,
    kept,
    open_study,
    planned,
    provenance,
    publish,
    result_file,
    run_cells,
    work_folder,
)

_MAY_CHANGE = ("learning_rates", "num_seeds")
"""More of them are more cells, and those that stand stay; with a budget they decide the steps."""


@holds_folder("studies")
def simultaneous_rl(
    study: SimultaneousRL,
    *,
    runs: Path = Path("runs"),
    callback: RunCallback | None = None,
    jobs: int | None = None,
) -> StudyResult:
    """Carry out the study in the folder runs/studies/NAME, from where it stands there.

    `jobs` cells are trained at once; None for one on each processor, or one on a GPU.
    Raises ConfigError for a model that is not there, before anything is written.
    """
    jobs = number_of_jobs(study.run.device, jobs)
    callback = callback or RunCallback()
    _check_model(study.run.model)
    callback.stage(f"Reading {study.run.model}")
    HeldOut(study.run, num_tasks=study.held_out_tasks)  # what is wrong with it is told now
    _check_pools(study)
    may_change = () if study.steps is None else _MAY_CHANGE
    folder = open_study(study, study.name, runs=runs, may_change=may_change)
    record_input_files(folder, model_files(study.run.model))
    timing = kept(folder / "timing.json", Timing, lambda: _timed(study, folder, jobs, callback))
    plan = planned(folder, Plan, lambda: make_plan(study, timing, jobs=jobs), steps=study.steps)
    for line in statement(study, timing, plan):
        callback.stage(line)
    cells = _cells(study, plan)
    expected = {name: cell_s(study, timing, cell.arm, plan.steps) for name, cell in cells.items()}
    left = [name for name in cells if not result_file(folder, name).exists()]
    done = run_cells(
        folder,
        expected,
        partial(_executor, study, cells, plan.steps, timing.start, folder),
        CellResult,
        callback=callback,
        within=Updates(callback, total=plan.steps * len(left)),
        jobs=jobs,
    )
    result = StudyResult(
        **provenance(study.run.device),
        study=study,
        timing=timing,
        plan=plan,
        cells=tuple(done.values()),
        findings=tuple(findings_of(study, tuple(done.values()))),
    )
    publish(folder, result, write_page=write_study_page, as_markdown=as_markdown)
    return result


def _check_model(model: str) -> None:
    if not (Path(model) / CONFIG_FILE).is_file():
        made = (
            "make run STAGE=sft makes it"
            if model == "runs/tiny-sft/model"
            else "give a model that answers, such as the result of `nemotron3 sft`, with --model; "
            "make run STAGE=sft makes runs/tiny-sft/model"
        )
        raise ConfigError(f"there is no model in {model}; {made}")


def _check_pools(study: SimultaneousRL) -> None:
    """Raises DataError now, and not in the middle, where an environment has too few tasks."""
    for config in study.run.environments:
        environment = load_environment(config.name, difficulty=config.difficulty)
        environment.distinct_tasks(study.curriculum.pool, split=Split.TRAIN, seed=0)


def _timed(study: SimultaneousRL, folder: Path, jobs: int, callback: RunCallback) -> Timing:
    """As many processes as will work at once take the time; the slowest one counts."""
    callback.stage("Playing held-out tasks, and timing a few updates")
    found = side_by_side(partial(_timer, study, folder), jobs)
    return max(found, key=lambda timing: timing.update_s)


def _timer(study: SimultaneousRL, folder: Path) -> Execute[Timing]:
    held_out = HeldOut(study.run, num_tasks=study.held_out_tasks)
    return lambda name, _: measure_timing(study, held_out, work_folder(folder, name))


def _executor(
    study: SimultaneousRL,
    cells: Mapping[str, Cell],
    steps: int,
    start: Evaluation,
    folder: Path,
) -> Execute[CellResult]:
    """What executes the cells of a process."""
    held_out = HeldOut(study.run, num_tasks=study.held_out_tasks)

    def execute(name: str, callback: RunCallback) -> CellResult:
        return run_cell(
            study,
            cells[name],
            steps=steps,
            start=start,
            held_out=held_out,
            work=work_folder(folder, name),
            callback=callback,
        )

    return execute


def _cells(study: SimultaneousRL, plan: Plan) -> dict[str, Cell]:
    """All cells by name, seed by seed, so that an unfinished study is a smaller one."""
    cells = [
        Cell(arm=arm, learning_rate=rate, seed=seed)
        for seed in range(plan.num_seeds)
        for rate in study.learning_rates
        for arm in Arm
    ]
    return {cell.name: cell for cell in cells}
