"""What all studies share: a folder, cells that are skipped where they stand, the time that is left.

A study is many short trainings, its cells. They are interrupted, resumed and extended one by one:

    runs/studies/NAME/
      run.json          the settings of the study, the machine, the versions
      cells/CELL.json   the result of a cell, written when the cell is finished
      work/CELL/        what an unfinished cell has so far, deleted when it is finished

A cell with a result is never executed again, so the command that was interrupted goes on when it is
repeated, and a study with more seeds keeps those that it has.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from nemotron3.config import RUN_FILE, from_record, read_record, to_record, write_json, write_run
from nemotron3.config.run import git_revision
from nemotron3.errors import ConfigError
from nemotron3.recipes.run_folder import RunCallback, differences
from nemotron3.runtime.devices import DeviceName, describe_device, resolve_device
from nemotron3.studies.jobs import Prepare, executed
from nemotron3.training.trainer import StepReport

R = TypeVar("R")

RESULT_FILE, PAGE_FILE, MARKDOWN_FILE = "result.json", "report.html", "report.md"
"""What a finished study leaves: everything, the page, and the tables of the page."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What every result says of its origin; that of a study adds `study` and what was found."""

    command: str
    date: str
    commit: str
    """Of this package; "unknown" outside of its repository."""
    device: str


P = TypeVar("P", bound=Published)


def provenance(device: DeviceName) -> dict[str, str]:
    """The fields of `Published`, here and at present."""
    return {
        "command": " ".join(["nemotron3", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": str((git_revision() or {}).get("commit", "unknown")),
        "device": describe_device(resolve_device(device)),
    }


def check_length(steps: int | None, budget_s: float | None, num_seeds: int) -> None:
    """Raises ConfigError unless either updates or a budget are given, and one seed or more."""
    if (steps is None) != (budget_s is not None):
        raise ConfigError("steps and budget_s exclude each other, and one is needed")
    if num_seeds < 1:
        raise ConfigError(f"is {num_seeds}; it must be 1 or more", field="num_seeds")


def open_study(config: Any, name: str, *, runs: Path, may_change: Collection[str] = ()) -> Path:
    """The folder of a study, made where there is none.

    Raises ConfigError where it holds a study with other settings. Fields in `may_change` say how
    many cells there are, not what a cell does; they may differ.
    """
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(
            f"is {name!r}; it names a folder, so no slash or leading dot", field="name"
        )
    folder = runs / "studies" / name
    if (folder / RUN_FILE).exists():
        before = read_record(folder)["config"]
        found = [
            change
            for change in sorted(differences(before, to_record(config)))
            if change[0].partition(".")[0].partition("[")[0] not in may_change
        ]
        if found:
            path, old, new = found[0]
            raise ConfigError(
                f"{folder} holds a study with other settings ({len(found)} differ, first {path}: "
                f"{old} there, {new} now); give this one another --name, or delete the folder"
            )
    write_run(folder, config)
    return folder


def kept(file: Path, cls: type[R], make: Callable[[], R]) -> R:
    """What a file holds; made and written there where it does not exist."""
    if file.exists():
        return from_record(cls, json.loads(file.read_text("utf-8")))
    made = make()
    write_json(file, made)
    return made


def planned(folder: Path, cls: type[R], make: Callable[[], R], *, steps: int | None) -> R:
    """The plan that the study began with; of fixed steps, one with the cells that are asked for."""
    file = folder / "plan.json"
    if steps is None:
        return kept(file, cls, make)
    plan = make()
    write_json(file, plan)
    return plan


def publish(
    folder: Path,
    result: P,
    *,
    write_page: Callable[[Path, P], object],
    as_markdown: Callable[[P], str],
) -> None:
    """Write what a finished study leaves."""
    write_json(folder / RESULT_FILE, result)
    write_page(folder / PAGE_FILE, result)
    (folder / MARKDOWN_FILE).write_text(as_markdown(result), encoding="utf-8")


def result_file(folder: Path, cell: str) -> Path:
    """Where the result of a cell is, once it is finished."""
    return folder / "cells" / f"{cell}.json"


def work_folder(folder: Path, cell: str) -> Path:
    """Where an unfinished cell keeps what it has so far."""
    return folder / "work" / cell


def run_cells(
    folder: Path,
    cells: Mapping[str, float],
    prepare: Prepare[R],
    cls: type[R],
    *,
    callback: RunCallback,
    within: RunCallback | None = None,
    jobs: int = 1,
) -> dict[str, R]:
    """The results of all cells; those without one are executed, begun in the order given.

    `cells` are their names with the seconds that each is expected to take. `prepare` makes what
    executes a cell, given its name; it may leave anything in `work_folder` to go on from after an
    interruption. `jobs` cells are executed at once. `callback` hears which cells begin, and
    `within` what happens inside of them.
    """
    files = {name: result_file(folder, name) for name in cells}
    left = [name for name in cells if not files[name].exists()]
    for name in cells.keys() - {*left}:  # an end between the result and this deletion leaves it
        shutil.rmtree(work_folder(folder, name), ignore_errors=True)
    if len(left) < len(cells):
        callback.stage(f"{len(cells) - len(left)} of {len(cells)} cells are finished")
    begun: dict[str, float] = {}
    expected = taken = 0.0

    def begin(name: str) -> None:
        pace = taken / expected if expected else 1.0
        unfinished = [other for other in left if not files[other].exists()]
        rest = pace * sum(cells[other] for other in unfinished) / min(jobs, len(unfinished))
        number = len(cells) - len(left) + len(begun) + 1
        callback.stage(f"Cell {number} of {len(cells)}: {name}, about {duration(rest)} left")
        begun[name] = time.perf_counter()

    for name, result in executed(
        left, prepare, jobs=jobs, begin=begin, callback=within or RunCallback()
    ):
        write_json(files[name], result)
        shutil.rmtree(work_folder(folder, name), ignore_errors=True)
        taken += time.perf_counter() - begun[name]
        expected += cells[name]
    return {name: from_record(cls, json.loads(f.read_text("utf-8"))) for name, f in files.items()}


class Updates(RunCallback):
    """Passes on how many updates of a study are made, and nothing of single runs."""

    def __init__(self, callback: RunCallback, *, total: int) -> None:
        self._callback, self._total, self._done = callback, total, 0

    def trained(self, report: StepReport) -> None:
        """An update was made."""
        del report
        self._done += 1
        self._callback.progress("updates", self._done, self._total)


class _Clock(RunCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def trained(self, report: StepReport) -> None:
        del report
        self.ends.append(time.perf_counter())


def timed_run(execute: Callable[[RunCallback], object], work: Path) -> tuple[float, list[float]]:
    """Seconds that a run in the folder `work` takes, and when each of its updates ended.

    The folder is deleted before and after.
    """
    shutil.rmtree(work, ignore_errors=True)
    clock = _Clock()
    started = time.perf_counter()
    execute(clock)
    whole = time.perf_counter() - started
    shutil.rmtree(work, ignore_errors=True)
    return whole, clock.ends


class Stopwatch:
    """Seconds of several calls, kept in a file: an interrupted cell goes on counting."""

    def __init__(self, file: Path) -> None:
        """Continue what is in the file, if there is one."""
        self._file = file
        self._before: float = json.loads(file.read_text("utf-8")) if file.exists() else 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of all calls, this one included."""
        return self._before + time.perf_counter() - self._started

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *_: object) -> None:
        write_json(self._file, self.seconds)


def counted(number: int, what: str) -> str:
    """1 seed, 2 seeds."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in words: 40 s, 12 min, 3 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
