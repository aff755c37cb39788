"""Carries the study out: timing, the plan and its cost, the cells, and the pages."""

import sys
from datetime import UTC, datetime
from pathlib import Path

from nemotron3.config import write_json
from nemotron3.config.run import git_revision
from nemotron3.environments.registry import load_environment
from nemotron3.environments.rows import Split
from nemotron3.errors import ConfigError
from nemotron3.models.huggingface.companions import CONFIG_FILE
from nemotron3.recipes.input_files import model_files, record_input_files
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.runtime.devices import describe_device, resolve_device
from nemotron3.studies.simultaneous_rl.arms import Arm, Cell
from nemotron3.studies.simultaneous_rl.cell import CellResult, HeldOut, run_cell
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
from nemotron3.studies.study import kept, open_study, result_file, run_cells
from nemotron3.training.trainer import StepReport

RESULT_FILE, PAGE_FILE, MARKDOWN_FILE = "result.json", "report.html", "report.md"
_MAY_CHANGE = ("learning_rates", "num_seeds")
"""More of them are more cells, and those that stand stay; with a budget they decide the steps."""


def simultaneous_rl(
    study: SimultaneousRL, *, runs: Path = Path("runs"), callback: RunCallback | None = None
) -> StudyResult:
    """Carry out the study in the folder runs/studies/NAME, from where it stands there.

    Raises ConfigError for a model that is not there, before anything is written.
    """
    callback = callback or RunCallback()
    _check_model(study.run.model)
    callback.stage(f"Reading {study.run.model}")
    held_out = HeldOut(study.run, num_tasks=study.held_out_tasks)
    _check_pools(study)
    may_change = () if study.steps is None else _MAY_CHANGE
    folder = open_study(study, study.name, runs=runs, may_change=may_change)
    record_input_files(folder, model_files(study.run.model))
    timing = kept(
        folder / "timing.json",
        Timing,
        lambda: _timed(study, held_out, folder / "work" / "timing", callback),
    )
    plan = _plan(study, timing, folder)
    for line in statement(study, timing, plan):
        callback.stage(line)
    cells = _cells(study, plan)
    expected = {name: cell_s(study, timing, cell.arm, plan.steps) for name, cell in cells.items()}
    left = [name for name in cells if not result_file(folder, name).exists()]
    updates = _Updates(callback, total=plan.steps * len(left))

    def execute(name: str, work: Path) -> CellResult:
        return run_cell(
            study,
            cells[name],
            steps=plan.steps,
            start=timing.start,
            held_out=held_out,
            work=work,
            callback=updates,
        )

    done = run_cells(folder, expected, execute, CellResult, callback=callback)
    result = StudyResult(
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        date=datetime.now(UTC).date().isoformat(),
        commit=str((git_revision() or {}).get("commit", "unknown")),
        device=describe_device(resolve_device(study.run.device)),
        study=study,
        timing=timing,
        plan=plan,
        cells=tuple(done.values()),
        findings=tuple(findings_of(study, tuple(done.values()))),
    )
    write_json(folder / RESULT_FILE, result)
    write_study_page(folder / PAGE_FILE, result)
    (folder / MARKDOWN_FILE).write_text(as_markdown(result), encoding="utf-8")
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


def _timed(study: SimultaneousRL, held_out: HeldOut, work: Path, callback: RunCallback) -> Timing:
    callback.stage("Playing held-out tasks, and timing a few updates")
    return measure_timing(study, held_out, work)


def _plan(study: SimultaneousRL, timing: Timing, folder: Path) -> Plan:
    """The plan that the study began with; of fixed steps, with the cells that are asked for."""
    file = folder / "plan.json"
    if study.steps is None:
        return kept(file, Plan, lambda: make_plan(study, timing))
    plan = make_plan(study, timing)
    write_json(file, plan)
    return plan


def _cells(study: SimultaneousRL, plan: Plan) -> dict[str, Cell]:
    """All cells by name, seed by seed, so that an unfinished study is a smaller one."""
    cells = [
        Cell(arm=arm, learning_rate=rate, seed=seed)
        for seed in range(plan.num_seeds)
        for rate in study.learning_rates
        for arm in Arm
    ]
    return {cell.name: cell for cell in cells}


class _Updates(RunCallback):
    """Passes on how many updates of a study are made, and nothing of single runs."""

    def __init__(self, callback: RunCallback, *, total: int) -> None:
        self._callback, self._total, self._done = callback, total, 0

    def trained(self, report: StepReport) -> None:
        del report
        self._done += 1
        self._callback.progress("updates", self._done, self._total)
