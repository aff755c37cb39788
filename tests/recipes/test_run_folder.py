"""What runs of every kind share, held by a kind that only counts."""

import json
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.config import from_record, read_run, to_record
from nemotron3.errors import ConfigError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.pretrain import PretrainRun, tiny
from nemotron3.recipes.run_config import RunConfig
from nemotron3.recipes.run_folder import RunCallback, RunFolder
from nemotron3.training.optimizers import SGDConfig
from nemotron3.training.schedules import Constant
from nemotron3.training.token_objective import TokenLossConfig, TokenObjective
from nemotron3.training.trainer import Trainer, TrainingConfig
from tests.tiny import tiny_config
from tests.training.batches import documents, pack

TRAINING = TrainingConfig(
    steps=4,
    batch_size=1,
    microbatch_size=1,
    seq_len=6,
    optimizer=SGDConfig(lr=0.1),
    schedule=Constant(),
    checkpoint_every_steps=1,
)


@dataclass(frozen=True, kw_only=True)
class FixedTextRun(RunConfig):
    """Another kind of run: one document, again and again, by the masked token loss."""

    kind: Literal["fixed-text"] = "fixed-text"
    training: TrainingConfig = TRAINING


@dataclass(frozen=True, kw_only=True)
class FixedTextSummary:
    """What it has to show."""

    weight: float


class StoppedError(Exception):
    """A test's own interruption."""


class Steps(RunCallback):
    """Keeps the steps it hears of, and stops the run after one of them."""

    def __init__(self, stop_after=None):
        self.seen, self.stop_after = [], stop_after

    def trained(self, report):
        self.seen.append(f"{report.step}/{report.steps}")
        if report.step == self.stop_after:
            raise StoppedError


def carry_out(run, runs, callback):
    folder = RunFolder(run, runs=runs)
    if (finished := folder.summary(FixedTextSummary)) is not None:
        return finished
    folder.record({"documents": 1})
    model = LanguageModel.from_config(tiny_config("M*"), seed=run.seed, device=folder.device)
    trainer = Trainer(
        model,
        run.training,
        objective=TokenObjective(TokenLossConfig(), num_mtp_depths=0),
        batches=lambda _: [pack(documents(6))],
        evaluation=lambda _: {},
        store=folder.checkpoints(),
        peak_flops=1e9,
    )
    folder.fit(trainer, callback)
    summary = FixedTextSummary(weight=model.output_weight.double().sum().item())
    folder.finish(summary)
    return summary


@pytest.fixture
def run():
    return FixedTextRun(name="mine", device="cpu", retention=RetentionConfig(keep_last=2))


def test_another_kind_of_run_is_recorded_and_goes_on_where_it_was_stopped(run, tmp_path):
    torch.set_num_threads(1)
    whole = carry_out(run, tmp_path / "whole", Steps())
    with pytest.raises(StoppedError):
        carry_out(run, tmp_path / "parts", Steps(stop_after=2))
    rest = Steps()
    assert carry_out(run, tmp_path / "parts", rest) == whole
    assert rest.seen == ["3/4", "4/4"]
    again = Steps()
    assert carry_out(run, tmp_path / "parts", again) == whole
    assert again.seen == []
    folder = tmp_path / "parts" / "mine"
    assert {path.name for path in folder.iterdir()} == {
        "run.json", "summary.json", "metrics.jsonl", "tensorboard", "checkpoints",
    }  # fmt: skip
    assert read_run(folder, FixedTextRun) == run
    extra = json.loads((folder / "run.json").read_text("utf-8"))["extra"]
    assert extra["documents"] == 1
    assert extra["device"].endswith("1 thread")
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"step-00000003", "step-00000004"}


def test_a_folder_of_another_configuration_is_refused_by_the_path_that_differs(run, tmp_path):
    RunFolder(run, runs=tmp_path).record({})
    other = replace(run, training=replace(TRAINING, optimizer=SGDConfig(lr=0.2)))
    with pytest.raises(ConfigError, match=r"1 differ, first training\.optimizer\.lr: 0\.1 there"):
        RunFolder(other, runs=tmp_path)
    RunFolder(run, runs=tmp_path)


def test_a_folder_of_another_kind_is_refused_by_its_kind(run, tmp_path):
    RunFolder(run, runs=tmp_path).record({})
    with pytest.raises(ConfigError, match=r"config\.kind is 'fixed-text'.*'pretrain'"):
        RunFolder(replace(tiny(), name="mine"), runs=tmp_path)


def test_a_record_says_its_kind():
    assert to_record(tiny())["kind"] == "pretrain"
    other = to_record(tiny()) | {"kind": "walk"}
    with pytest.raises(ConfigError, match=r"config\.kind is 'walk'; it must be one of 'pretrain'"):
        from_record(PretrainRun, other, path="config")


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_name_must_be_a_folders(name):
    with pytest.raises(ConfigError, match="names a folder"):
        FixedTextRun(name=name)
