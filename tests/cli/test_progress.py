"""What a person sees of a run: lines in a log, a bar in a terminal."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from nemotron3.cli import progress
from nemotron3.cli.progress import LogCallback, TerminalCallback, status, watch
from nemotron3.errors import DependencyMissingError
from nemotron3.training.trainer import StepReport

METRICS = {"train/loss": 2.0, "perf/tokens_per_s": 12_345.6, "moe/max_vio": 0.5}


def test_the_status_holds_what_is_worth_watching():
    assert status(METRICS) == "loss 2.000  max-vio 0.50  12,346 tokens/s"
    looked = status({**METRICS, "eval/bits_per_byte": 1.5})
    assert "held-out 1.500 bits/byte" in looked
    dense = {name: value for name, value in METRICS.items() if name != "moe/max_vio"}
    assert "max-vio" not in status(dense)


def test_a_log_gets_a_line_now_and_then_and_at_the_end(capsys, monkeypatch):
    """Steps of 4 s: with a line every 15 s, four steps make one."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    steps = 10
    callback = LogCallback()
    callback.stage("Training on a test")
    for step in range(1, 11):
        callback.trained(StepReport(step=step, steps=steps, metrics=METRICS))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Training on a test"
    shown = [int(re.search(r"step +(\d+)/10", line)[1]) for line in lines[1:]]
    assert shown == [4, 8, 10]
    assert lines[1].endswith("0:24 left")
    assert lines[-1].endswith("0:00 left")
    assert "loss 2.000" in lines[1]


def test_a_log_says_now_and_then_how_far_a_long_part_is(capsys, monkeypatch):
    moment = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: moment))
    callback = LogCallback()
    for done in range(0, 1001, 100):
        callback.progress("held-out tasks", done, 1000)
        callback.progress("survey", done, 0)  # a total that is not known yet
        moment += 8
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"  held-out tasks {done} of 1,000" for done in (200, 400, 600, 800)]


def test_a_resumed_run_reckons_from_where_it_went_on(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    steps = 100
    callback = LogCallback()
    for step in (91, 92):
        callback.trained(StepReport(step=step, steps=steps, metrics=METRICS))
    assert capsys.readouterr().out.splitlines()[-1].endswith("2:40 left")  # 8 steps of 20 s


def test_a_terminal_gets_a_bar_for_each_part():
    rich = pytest.importorskip("rich.progress")
    console = pytest.importorskip("rich.console").Console
    output = io.StringIO()
    columns = (
        rich.TextColumn("{task.description} {task.fields[status]}"),
        rich.MofNCompleteColumn(),
    )
    steps = 10
    with rich.Progress(*columns, console=console(file=output, width=120)) as bars:
        callback = TerminalCallback(bars)
        callback.stage("Preparing the corpus")
        callback.progress("survey", 500, 0)  # the total is not known yet
        callback.progress("encode", 500, 1000)
        for step in range(1, 8):
            callback.trained(StepReport(step=step, steps=steps, metrics=METRICS))
        tasks = {task.description: (task.completed, task.total) for task in bars.tasks}
    assert tasks == {"survey": (500, 0), "encode": (500, 1000), "training": (7, 10)}
    assert "Preparing the corpus" in output.getvalue()
    assert "loss 2.000" in output.getvalue()


def test_where_output_goes_decides_who_watches(monkeypatch):
    with watch() as callback:
        assert isinstance(callback, LogCallback)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with watch() as callback:
        assert isinstance(callback, TerminalCallback)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(DependencyMissingError, match="pip install"), watch():
        pass
