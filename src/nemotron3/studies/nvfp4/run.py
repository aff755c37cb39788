"""Carries the study out: timing, the plan and its cost, the cells, and the pages."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from nemotron3.data import Corpus
from nemotron3.data.manifest import Manifest
from nemotron3.errors import ConfigError
from nemotron3.recipes.inputs import open_inputs
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_lock import holds_folder
from nemotron3.studies.jobs import Execute, number_of_jobs, side_by_side
from nemotron3.studies.nvfp4.arms import Arm, Cell
from nemotron3.studies.nvfp4.cell import CellResult, run_cell
from nemotron3.studies.nvfp4.config import NVFP4Study
from nemotron3.studies.nvfp4.findings import findings_of
from nemotron3.studies.nvfp4.ingredients import measure_roundings
from nemotron3.studies.nvfp4.page import as_markdown, write_page
from nemotron3.studies.nvfp4.plan import (
    Plan,
    Timing,
    cell_s,
    make_plan,
    measure_timing,
    slowest,
    statement,
)
from nemotron3.studies.nvfp4.result import StudyResult
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

_MAY_CHANGE = ("num_seeds",)
"""More of them are more cells, and those that stand stay; with a budget they decide the steps."""


@holds_folder("studies")
def nvfp4(
    study: NVFP4Study,
    *,
    runs: Path = Path("runs"),
    callback: RunCallback | None = None,
    jobs: int | None = None,
) -> StudyResult:
    """Carry out the study in the folder runs/studies/NAME, from where it stands there.

    `jobs` cells are trained at once; None for one on each processor, or one on a GPU.
    """
    jobs = number_of_jobs(study.run.device, jobs)
    callback = callback or RunCallback()
    callback.stage("Preparing the corpus")
    corpus = _corpus(study, runs, callback)
    may_change = () if study.steps is None else _MAY_CHANGE
    folder = open_study(study, study.name, runs=runs, may_change=may_change)
    _check_corpus(folder, corpus)
    timing = kept(folder / "timing.json", Timing, lambda: _timed(study, folder, jobs, callback))
    plan = planned(folder, Plan, lambda: make_plan(study, timing, jobs=jobs), steps=study.steps)
    for line in statement(study, timing, plan):
        callback.stage(line)
    cells = _cells(plan)
    expected = {name: cell_s(timing, cell.arm, plan.steps) for name, cell in cells.items()}
    left = [name for name in cells if not result_file(folder, name).exists()]
    done = run_cells(
        folder,
        expected,
        partial(_executor, study, cells, plan.steps, folder),
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
        roundings=tuple(measure_roundings()),
        cells=tuple(done.values()),
        findings=tuple(findings_of(study, tuple(done.values()))),
    )
    publish(folder, result, write_page=write_page, as_markdown=as_markdown)
    return result


def _corpus(study: NVFP4Study, folder: Path, callback: RunCallback | None = None) -> Corpus:
    """The text of all cells, prepared where it is not."""
    callback = callback or RunCallback()
    corpus, _ = open_inputs(
        folder, study.run.corpus, say=callback.stage, progress=callback.progress
    )
    return corpus


def _check_corpus(folder: Path, corpus: Corpus) -> None:
    """Raises ConfigError where the cells that stand were trained on another text."""
    if kept(folder / "corpus.json", Manifest, lambda: corpus.manifest) != corpus.manifest:
        raise ConfigError(
            f"{folder} was begun with another text or tokenizer than there is at present; restore "
            "them, give this study another --name, or delete the folder to begin anew"
        )


def _timed(study: NVFP4Study, folder: Path, jobs: int, callback: RunCallback) -> Timing:
    """As many processes as will work at once take the time; the slowest one counts."""
    callback.stage("Timing a few updates of every arm")
    return slowest(side_by_side(partial(_timer, study, folder), jobs))


def _timer(study: NVFP4Study, folder: Path) -> Execute[Timing]:
    corpus = _corpus(study, folder)
    return lambda name, _: measure_timing(study, corpus, work_folder(folder, name))


def _executor(
    study: NVFP4Study, cells: Mapping[str, Cell], steps: int, folder: Path
) -> Execute[CellResult]:
    """What executes the cells of a process."""
    corpus = _corpus(study, folder)

    def execute(name: str, callback: RunCallback) -> CellResult:
        work = work_folder(folder, name)
        return run_cell(
            study, cells[name], steps=steps, corpus=corpus, work=work, callback=callback
        )

    return execute


def _cells(plan: Plan) -> dict[str, Cell]:
    """All cells by name, seed by seed, so that an unfinished study is a smaller one."""
    cells = [Cell(arm=arm, seed=seed) for seed in range(plan.num_seeds) for arm in Arm]
    return {cell.name: cell for cell in cells}
