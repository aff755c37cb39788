"""The progress of a run: a live line in a terminal, plain lines in a log."""

import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nemotron3.errors import DependencyMissingError
from nemotron3.observe.metrics import MetricWindow
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.training.trainer import StepReport

_WINDOW_STEPS = 20
_LOG_EVERY_S = 15.0


@contextmanager
def watch() -> Iterator[RunCallback]:
    """A callback for this terminal, or for a log where output goes to one."""
    if not sys.stdout.isatty():
        yield LogCallback()
        return
    try:
        progress: Any = importlib.import_module("rich.progress")
    except ImportError as error:
        raise DependencyMissingError(
            "showing progress needs the package rich: pip install 'nemotron3[train]'"
        ) from error
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeRemainingColumn(compact=True),
    )
    with progress.Progress(*columns) as bars:
        yield TerminalCallback(bars)


class LogCallback(RunCallback):
    """A line for each stage, and one every few seconds for what takes long."""

    def __init__(self) -> None:
        """Nothing has been shown yet."""
        self._window = MetricWindow(_WINDOW_STEPS)
        self._started = self._shown = time.monotonic()
        self._first_step: int | None = None

    def progress(self, what: str, done: int, total: int) -> None:
        """Say how far a long part is, now and then."""
        now = time.monotonic()
        if now - self._shown >= _LOG_EVERY_S and done < total:
            self._shown = now
            print(f"  {what} {done:,} of {total:,}", flush=True)

    def stage(self, message: str) -> None:
        """Say what begins."""
        print(message, flush=True)

    def trained(self, report: StepReport) -> None:
        """Say how training stands, now and then."""
        self._window.write(report.step, report.metrics)
        now = time.monotonic()
        if self._first_step is None:
            self._first_step, self._started = report.step, now
        if now - self._shown < _LOG_EVERY_S and report.step != report.steps:
            return
        self._shown = now
        line = f"  step {report.step:>6}/{report.steps}  {status(self._window.averages())}"
        if done := report.step - self._first_step:  # the first step alone tells no pace
            left = (now - self._started) / done * (report.steps - report.step)
            line += f"  {_duration(left)} left"
        print(line, flush=True)


class TerminalCallback(RunCallback):
    """A live bar for each long part."""

    def __init__(self, bars: Any) -> None:
        """Draw on rich's `bars`."""
        self._bars = bars
        self._tasks: dict[str, Any] = {}
        self._window = MetricWindow(_WINDOW_STEPS)

    def stage(self, message: str) -> None:
        """Say what begins."""
        self._bars.console.print(message, highlight=False, markup=False)

    def progress(self, what: str, done: int, total: int) -> None:
        """Move a bar."""
        self._move(what, done, total, "")

    def trained(self, report: StepReport) -> None:
        """Move the training bar."""
        self._window.write(report.step, report.metrics)
        self._move("training", report.step, report.steps, status(self._window.averages()))

    def _move(self, what: str, done: int, total: int, message: str) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, status="")
        self._bars.update(self._tasks[what], completed=done, total=total, status=message)


def status(averages: dict[str, float]) -> str:
    """The numbers worth watching, on one line."""
    if "reward/mean" in averages:
        parts = [f"reward {averages['reward/mean']:.3f}"]
    elif "train/agreement" in averages:  # of a distillation, whose loss is a small divergence
        parts = [f"KL {averages['train/loss']:.5f}"]
    else:
        parts = [f"loss {averages['train/loss']:.3f}"]
    if "eval/reward" in averages:
        parts.append(f"held-out {averages['eval/reward']:.3f}")
    if "eval/bits_per_byte" in averages:
        parts.append(f"held-out {averages['eval/bits_per_byte']:.3f} bits/byte")
    elif "eval/kl" in averages:
        parts.append(f"held-out KL {averages['eval/kl']:.5f}")
    elif "eval/loss" in averages:
        parts.append(f"held-out {averages['eval/loss']:.3f}")
    if "moe/max_vio" in averages:
        parts.append(f"max-vio {averages['moe/max_vio']:.2f}")
    parts.append(f"{averages['perf/tokens_per_s']:,.0f} tokens/s")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
