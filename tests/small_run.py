"""A whole pre-training run in two seconds: every kind of layer, and text made on the spot.

The text is sentences drawn from a small grammar, so that it has something to learn at every level
(letters, words, order) and no package has to hold it.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.data import BaselinesConfig, CorpusConfig, FilesConfig, TrainTokenizerConfig
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.samples import SampleConfig
from nemotron3.training.optimizers import AdamWConfig
from nemotron3.training.schedules import WSD
from nemotron3.training.trainer import TrainingConfig
from tests.tiny import tiny_config

VOCABULARY = 320
_SUBJECTS = ("the old sailor", "a quiet child", "every engine", "my neighbour", "the river")
_VERBS = ("remembers", "follows", "repairs", "never sees", "counts")
_OBJECTS = ("the harbour", "seven lanterns", "a broken clock", "the northern road", "its own name")
_ENDS = ("before dawn", "in the rain", "without a word", "for the third time", "as before")


def write_text(folder: Path, *, documents: int = 60, seed: int = 0) -> Path:
    """Text files of a few sentences each."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        sentences = [
            " ".join(draw.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))
            for _ in range(draw.randint(3, 12))
        ]
        text = ". ".join(sentences).capitalize() + f". ({number})\n"
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def small_run(text: Path, **changes: Any) -> PretrainRun:
    """A run on the text in a folder; `training` is a dict of the fields of its config to change."""
    training = {
        "steps": 8,
        "batch_size": 4,
        "microbatch_size": 2,
        "seq_len": 32,
        "optimizer": AdamWConfig(lr=1e-2),
        "evaluate_every_steps": 4,
        "checkpoint_every_steps": 3,
        "measure_every_steps": 4,
    } | changes.pop("training", {})
    steps = training["steps"]
    warmup = min(2, steps - 1)
    schedule = WSD(total_steps=steps, warmup_steps=warmup, decay_steps=max(1, steps // 4))
    fields: dict[str, Any] = {
        "name": "small",
        "model": tiny_config("ME*-E/*E/*E", vocab_size=VOCABULARY, hidden_size=32),
        "corpus": CorpusConfig(
            sources=(FilesConfig(path=str(text)),),
            tokenizer=TrainTokenizerConfig(vocab_size=VOCABULARY),
            held_out_fraction=0.1,
        ),
        "training": TrainingConfig(**({"schedule": schedule} | training)),
        "evaluation_rows": 4,
        "baselines": BaselinesConfig(order=2),
        "device": "cpu",
        "sampling": SampleConfig(max_tokens=4),
    }
    return PretrainRun(**(fields | changes))


def lasting_metrics(folder: Path) -> list[str]:
    """The lines of a run's metrics without what the clock says."""
    return [
        json.dumps([step, {k: v for k, v in metrics.items() if not k.startswith("perf/")}])
        for step, metrics in read_metrics(folder / "metrics.jsonl")
    ]


def leaves(config: Any, path: str = "") -> dict[str, Any]:
    """Every plain value of a nested config, by its dotted path."""
    if not dataclasses.is_dataclass(config):
        return {path: config}
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        found |= leaves(getattr(config, field.name), f"{path}.{field.name}" if path else field.name)
    return found


def with_leaf(config: Any, path: str, value: Any) -> Any:
    """The config with one nested value changed."""
    name, _, rest = path.partition(".")
    changed = with_leaf(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: changed})


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """The run inside is interrupted when the checkpoint of `step` stands; it must get there."""
    save = CheckpointStore.save

    def save_and_die(store: CheckpointStore, at: int, **content: Any) -> None:
        save(store, at, **content)
        if at == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            yield


class StoppedError(Exception):
    """A test's own interruption."""


class StopAt(RunCallback):
    """Interrupts a run when an update has been made."""

    def __init__(self, step):
        self.step = step

    def trained(self, report):
        if report.step == self.step:
            raise StoppedError


class Listener(RunCallback):
    """Hears what a run says."""

    def __init__(self):
        self.said = []

    def stage(self, message):
        self.said.append(message)
