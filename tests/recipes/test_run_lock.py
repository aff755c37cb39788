"""Two processes in one folder: the second is refused, and a dead one holds nothing."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from nemotron3.errors import ConfigError
from nemotron3.recipes.pretrain import tiny
from nemotron3.recipes.run_lock import LOCK_FILE, folder_lock, holds_folder
from nemotron3.recipes.run_pretrain import pretrain
from nemotron3.recipes.run_rl import rl
from nemotron3.recipes.run_sft import sft
from nemotron3.studies.simultaneous_rl import simultaneous_rl

HOLDER = """
import sys, time
from pathlib import Path
from nemotron3.recipes.run_lock import folder_lock
with folder_lock(Path(sys.argv[1]), say=print):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds runs/mine."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "runs" / "mine")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def refuse(_):
    pytest.fail("nothing is said where locks work")


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path, holder):
    folder = tmp_path / "runs" / "mine"
    said = rf"mine is in use by process {holder.pid} on .*, since 20.*; wait .* another --name"
    with pytest.raises(ConfigError, match=said), folder_lock(folder, say=refuse):
        pytest.fail("the folder is held")
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (folder / LOCK_FILE).exists()
    with folder_lock(folder, say=refuse):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("execute", [pretrain, sft, rl])
def test_runs_of_every_kind_are_refused_before_they_read_anything(tmp_path, holder, execute):
    run = SimpleNamespace(name="mine")  # whatever a run reads of itself would be missing
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid}"):
        execute(run, runs=tmp_path / "runs")


def test_studies_are_refused(tmp_path):
    folder = tmp_path / "runs" / "studies" / "mine"
    with (
        folder_lock(folder, say=refuse),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"),
    ):
        simultaneous_rl(SimpleNamespace(name="mine"), runs=tmp_path / "runs")


def test_a_finished_run_is_shown_while_another_process_holds_it(tmp_path, holder):
    del holder
    (tmp_path / "runs" / "mine" / "summary.json").touch()

    @holds_folder()
    def show(run, *, runs, callback=None):
        return run.name, runs, callback

    run = SimpleNamespace(name="mine")
    assert show(run, runs=tmp_path / "runs") == ("mine", tmp_path / "runs", None)


@pytest.mark.parametrize("ends_by", [KeyboardInterrupt, ValueError, None])
def test_the_folder_is_free_after_any_end(tmp_path, ends_by):
    with ExitStack() as stack:
        if ends_by:
            stack.enter_context(pytest.raises(ends_by))
        with folder_lock(tmp_path / "runs" / "mine", say=refuse):
            if ends_by:
                raise ends_by
    assert not (tmp_path / "runs").exists()  # a refused run leaves nothing
    with folder_lock(tmp_path / "runs" / "mine", say=refuse):
        (tmp_path / "runs" / "mine" / "run.json").touch()
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["run.json"]


def test_of_many_that_come_and_go_one_has_the_folder_at_a_time(tmp_path):
    inside, most, refused, entered = [], [], [], []

    def come_and_go():
        for _ in range(200):
            try:
                with folder_lock(tmp_path / "runs" / "mine", say=refuse):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                entered.append(1)
            except ConfigError:
                refused.append(1)

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(entered) + len(refused) == 800


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said = []
    with folder_lock(tmp_path / "mine", say=said.append):
        assert (tmp_path / "mine" / LOCK_FILE).exists()
    assert len(said) == 1
    assert "has no locks (No locks available)" in said[0]


def test_a_whole_run_holds_its_folder(tmp_path, monkeypatch):
    held = []

    def look(*_):
        held.append((tmp_path / "runs" / "tiny" / LOCK_FILE).exists())
        raise KeyboardInterrupt

    monkeypatch.setattr("nemotron3.recipes.run_pretrain.check_initial_model", look)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrain(tiny(), runs=tmp_path / "runs")
    assert held == [True, True]
    assert not (tmp_path / "runs").exists()
