"""Folders and cells of studies: skipped, resumed, refused."""

import json
import os
import signal
import time
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from nemotron3.errors import ConfigError, DataError, Nemotron3Error
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.studies.study import (
    Stopwatch,
    duration,
    kept,
    open_study,
    run_cells,
    work_folder,
)
from nemotron3.training.trainer import StepReport


@dataclass(frozen=True, kw_only=True)
class Found:
    value: int


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: int = 3
    seeds: int = 1


class Said(RunCallback):
    def __init__(self):
        self.messages, self.steps = [], 0

    def stage(self, message):
        self.messages.append(message)

    def trained(self, report):
        self.steps += report.step


def execute_elsewhere(folder, name, callback):
    """A cell that leaves its process and threads, and fails or dies where its name says so."""
    work_folder(folder, name).mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()}")
    callback.stage(f"inside of {name}")
    callback.trained(StepReport(step=2, steps=2, metrics={}))
    while name in ("fails", "dies") and not (folder / "waits").exists():
        time.sleep(0.01)
    if name == "fails":
        raise DataError("has no rows", field="tasks")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    while name.startswith("waits") and not (folder / "a").exists():
        time.sleep(0.01)
    return Found(value=len(name))


def prepare_elsewhere(folder):
    return partial(execute_elsewhere, folder)


def test_cells_that_stand_are_skipped_and_an_interrupted_one_finds_its_work(tmp_path):
    executed = []

    def execute(name, _):
        executed.append(name)
        work = work_folder(tmp_path, name)
        work.mkdir(parents=True, exist_ok=True)
        began = (work / "began").exists()
        (work / "began").touch()
        if name == "b" and not began:
            raise KeyboardInterrupt
        return Found(value=len(name) + began)

    cells = {"a": 10.0, "b": 10.0, "cc": 10.0}
    with pytest.raises(KeyboardInterrupt):
        run_cells(tmp_path, cells, lambda: execute, Found, callback=RunCallback())
    said = Said()
    found = run_cells(tmp_path, cells, lambda: execute, Found, callback=said)
    assert executed == ["a", "b", "b", "cc"]
    assert found == {"a": Found(value=1), "b": Found(value=2), "cc": Found(value=2)}
    assert said.messages[0] == "1 of 3 cells are finished"
    assert said.messages[1].startswith("Cell 2 of 3: b, about 20 s left")
    assert said.messages[2].startswith("Cell 3 of 3: cc")
    assert not any((tmp_path / "work").iterdir())
    (tmp_path / "work" / "a").mkdir()  # killed before the deletion
    assert run_cells(tmp_path, cells, lambda: execute, Found, callback=said) == found
    assert not any((tmp_path / "work").iterdir())
    assert len(executed) == 4


def test_a_cell_that_is_not_whole_is_no_result(tmp_path):
    """A result is written under another name first, as a kill in the middle leaves it."""
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json.tmp").write_text('{"val')
    cells = {"a": 1.0}
    found = run_cells(
        tmp_path, cells, lambda: lambda *_: Found(value=3), Found, callback=RunCallback()
    )
    assert found == {"a": Found(value=3)}


@pytest.mark.slow
def test_cells_side_by_side_share_the_processors(tmp_path):
    """The first cell waits for the last one, which a second process has to execute."""
    cells = {"waits": 9.0, "bb": 9.0, "a": 9.0}
    said, within = Said(), Said()
    prepare = partial(prepare_elsewhere, tmp_path)
    found = run_cells(tmp_path, cells, prepare, Found, callback=said, within=within, jobs=2)
    assert found == {name: Found(value=len(name)) for name in cells}
    pids, threads = zip(*((tmp_path / name).read_text().split() for name in cells), strict=True)
    assert pids[0] != pids[1] == pids[2]
    assert {*threads} == {str(max(1, torch.get_num_threads() // 2))}
    assert said.messages[0] == "Cell 1 of 3: waits, about 14 s left"
    assert sorted(within.messages) == ["inside of a", "inside of bb", "inside of waits"]
    assert within.steps == 6
    assert not any((tmp_path / "work").iterdir())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("fails", DataError, "tasks has no rows"),
        ("dies", Nemotron3Error, r"the cell dies was ended from outside \(exit code -9.*--jobs 1"),
    ],
)
def test_a_failed_cell_ends_the_others_which_go_on_the_next_time(tmp_path, name, kind, message):
    cells = {"waits": 1.0, name: 1.0}
    prepare = partial(prepare_elsewhere, tmp_path)
    with pytest.raises(kind, match=message):
        run_cells(tmp_path, cells, prepare, Found, callback=RunCallback(), jobs=2)
    assert not (tmp_path / "cells").exists()
    pid = int((tmp_path / "waits").read_text().split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert work_folder(tmp_path, name).exists()


def test_a_folder_belongs_to_one_study_and_may_grow(tmp_path):
    folder = open_study(Settings(), "one", runs=tmp_path, may_change=("seeds",))
    assert folder == tmp_path / "studies" / "one"
    assert open_study(Settings(seeds=4), "one", runs=tmp_path, may_change=("seeds",)) == folder
    assert json.loads((folder / "run.json").read_text())["config"]["seeds"] == 4
    with pytest.raises(ConfigError, match=r"other settings \(1 differ, first steps: 3 there, 5"):
        open_study(Settings(steps=5), "one", runs=tmp_path, may_change=("seeds",))
    with pytest.raises(ConfigError, match="first seeds: 4 there, 1 now"):
        open_study(Settings(), "one", runs=tmp_path)
    for name in ("", "a/b", ".a"):
        with pytest.raises(ConfigError, match="names a folder"):
            open_study(Settings(), name, runs=tmp_path)


def test_what_is_kept_is_made_once(tmp_path):
    made = [Found(value=1), Found(value=2)]
    assert kept(tmp_path / "a.json", Found, made.pop) == Found(value=2)
    assert kept(tmp_path / "a.json", Found, made.pop) == Found(value=2)


def test_seconds_are_counted_over_interruptions(tmp_path):
    file = tmp_path / "cell" / "seconds.json"
    with pytest.raises(KeyboardInterrupt), Stopwatch(file):
        raise KeyboardInterrupt
    before = json.loads(file.read_text())
    with Stopwatch(file) as stopwatch:
        assert stopwatch.seconds > before > 0


def test_times_are_told_in_words():
    said = [duration(s) for s in (0.4, 40, 89, 90, 600, 3569, 3600, 11_100)]
    assert said == ["0 s", "40 s", "89 s", "2 min", "10 min", "59 min", "1 h 0 min", "3 h 5 min"]
