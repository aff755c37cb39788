"""A run's folder, runs/NAME: the files of runs of all kinds, and resuming from them.

    run.json            the whole configuration, and what was found when it ran
    checkpoints/        weights, optimizer and step; an interrupted run resumes from the newest
    metrics.jsonl       the metrics of every step; tensorboard/ has them too
    model/              the result, as a model directory
    before.json         of rl: held-out tasks played before training
    rollouts.jsonl      of rl: those tasks before and after, and some rollouts between
    adapter/            the result of training an adapter; model/ has it merged
    lock                of the process that works in it, while it does (`run_lock.py`)
    summary.json        the result; it is written last, so a run with one is finished

A folder belongs to one configuration. Another one is refused there: its checkpoints would be
continued wrongly.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.config import RUN_FILE, from_record, read_run, to_record, write_json, write_run
from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.observe.metrics import MetricLog
from nemotron3.observe.sinks import JsonlSink, TensorBoardSink
from nemotron3.recipes.run_config import RunConfig
from nemotron3.runtime.devices import describe_device, resolve_device
from nemotron3.training.trainer import StepReport, Trainer

SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
BEFORE_FILE, ROLLOUTS_FILE = "before.json", "rollouts.jsonl"
MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
TOKENIZER_FOLDER = "tokenizer"
"""What any model of the run needs beside its weights."""

RunT = TypeVar("RunT", bound=RunConfig)
S = TypeVar("S")


class RunCallback:
    """Hears how a run goes on; by default nobody listens."""

    def stage(self, message: str) -> None:
        """A part of the run begins."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A long part that is not training has come so far; another thread may say so."""

    def trained(self, report: StepReport) -> None:
        """An update was made."""


class RunFolder(Generic[RunT]):
    """The folder of one run."""

    def __init__(self, run: RunT, *, runs: Path) -> None:
        """Finds the run's device; raises ConfigError where the folder holds another run."""
        self.run = run
        self.path = runs / run.name
        self.device = resolve_device(run.device)
        self._check_same_config()

    @property
    def model(self) -> Path:
        """Where the result is written."""
        return self.path / MODEL_FOLDER

    @property
    def adapter(self) -> Path:
        """Where the adapter is written, if one is trained."""
        return self.path / ADAPTER_FOLDER

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is kept from the beginning."""
        return self.path / TOKENIZER_FOLDER

    def checkpoints(self) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(self.path / "checkpoints", retention=self.run.retention)

    def record(self, found: Mapping[str, Any]) -> None:
        """Write `run.json`, with what was `found` at run time beside the device."""
        write_run(self.path, self.run, extra={"device": describe_device(self.device), **found})

    def fit(self, trainer: Trainer[Any], callback: RunCallback) -> None:
        """Train from the newest checkpoint to the last step, and log."""
        with self._metric_log(next_step=trainer.resume() + 1) as log:
            trainer.fit(log, on_step=callback.trained)

    def summary(self, cls: type[S]) -> S | None:
        """What a finished run has to show; None for one that is not finished."""
        file = self.path / SUMMARY_FILE
        return read_summary(self.path, cls) if file.exists() else None

    def finish(self, summary: Any) -> None:
        """Write the summary: the run is finished."""
        write_json(self.path / SUMMARY_FILE, summary)

    def _check_same_config(self) -> None:
        if not (self.path / RUN_FILE).exists():
            return
        before, now = to_record(read_run(self.path, type(self.run))), to_record(self.run)
        changed = sorted(differences(before, now))
        if changed:
            path, old, new = changed[0]
            raise ConfigError(
                f"{self.path} holds a run with other settings ({len(changed)} differ, first "
                f"{path}: {old} there, {new} now); give this one another --name, or delete the "
                "folder"
            )

    def _metric_log(self, *, next_step: int) -> MetricLog:
        try:
            tensorboard = TensorBoardSink(self.path / "tensorboard", next_step=next_step)
        except ImportError as error:
            raise DependencyMissingError(str(error)) from error
        return MetricLog([JsonlSink(self.path / METRICS_FILE, next_step=next_step), tensorboard])


def read_summary(folder: Path, cls: type[S]) -> S:
    """The summary of a finished run."""
    return from_record(cls, json.loads((folder / SUMMARY_FILE).read_text("utf-8")))


def differences(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two records differ: the dotted path, the value before, and the value now."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for index, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys():
            yield from differences(
                before.get(key), now.get(key), f"{path}.{key}" if path else str(key)
            )
    elif before != now:
        yield path, str(before), str(now)
