"""A run that is killed, however often and wherever, ends as if it had not been.

The processes are real, and so is the signal: SIGKILL, which no handler sees. A process dies at a
chosen call to the file system, in the middle of writing a checkpoint, or at a time drawn at random.
A server that has PyTorch loaded forks them, so that a start costs little.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.recipes.run_folder import RunCallback, read_summary
from nemotron3.recipes.run_pretrain import PretrainSummary, pretrain
from tests.small_run import lasting_metrics, small_run, with_leaf, write_text

STEPS = 12
MID_CHECKPOINT = [
    ("open", "tensors.safetensors", 1),
    ("open", "state.json", 2),
    ("open", "manifest.json", 1),
    ("os.rename", "step-", 3),
    ("os.rename", "step-00000012", 1),
    ("open", "summary.json.tmp", 1),
]
"""The file-system event at whose n-th occurrence a process kills itself."""


def run_in(folder: Path):
    return small_run(folder / "text", training={"steps": STEPS, "checkpoint_every_steps": 2})


def train(folder: Path, runs: str, die_at: tuple[str, str, int] | None = None) -> None:
    """What a process does: train to the end, or to its death."""
    torch.set_num_threads(1)
    os.environ["NEMOTRON3_CACHE"] = str(folder / "cache")
    if die_at is not None:
        die(*die_at)
    pretrain(run_in(folder), runs=folder / runs)


def die(event: str, name: str, occurrence: int) -> None:
    seen = 0

    def hook(happening: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if happening != event:
            return
        # A renaming has the temporary name first, and then the one that counts.
        temporary, target = str(arguments[0]), str(arguments[event == "os.rename"])
        is_written = event == "os.rename" or arguments[1] != "rb"
        if ".tmp" in temporary and name in Path(target).name and is_written:
            seen += 1
            if seen == occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.contracts.preload", __name__])
    return context


def start(context: ForkServerContext, *arguments: object) -> multiprocessing.process.BaseProcess:
    process = context.Process(target=train, args=arguments)
    process.start()
    return process


def finish(process: multiprocessing.process.BaseProcess) -> int:
    process.join(timeout=120)
    code = process.exitcode
    assert code is not None
    process.close()
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory, context) -> Iterator[Path]:
    """Text, and beside it a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("resume")
    write_text(folder / "text")
    assert finish(start(context, folder, "whole")) == 0
    return folder


def outcome(folder: Path, runs: str) -> tuple[dict[str, str], list[str]]:
    """Digests of the last checkpoint and the model, and every metric that is not about time."""
    run = folder / runs / "small"
    files = [*run.glob(f"checkpoints/step-{STEPS:08d}/*"), *run.glob("model/*")]
    digests = {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert any("tensors.safetensors" in name for name in digests)
    assert any(name.startswith("model/model") for name in digests)
    return digests, lasting_metrics(run)


def assert_as_if_uninterrupted(folder: Path, runs: str) -> None:
    digests, metrics = outcome(folder, runs)
    wanted_digests, wanted_metrics = outcome(folder, "whole")
    assert metrics == wanted_metrics
    assert len(metrics) == STEPS
    assert digests == wanted_digests
    one, two = (read_summary(folder / name / "small", PretrainSummary) for name in (runs, "whole"))
    assert (one.bits_per_byte, one.samples) == (two.bits_per_byte, two.samples)


@pytest.mark.slow
def test_killed_in_the_middle_of_writing(folder, context):
    """One run, killed at every dangerous moment in turn."""
    for moment in MID_CHECKPOINT:
        assert finish(start(context, folder, "moments", moment)) == -signal.SIGKILL, moment
    left = list((folder / "moments/small/checkpoints").glob("*.tmp-*"))
    assert finish(start(context, folder, "moments")) == 0
    assert_as_if_uninterrupted(folder, "moments")
    assert not any(path.exists() for path in left)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_times(folder, context, seed):
    """Four deaths, each some way into the training that is left."""
    draw = random.Random(seed)
    runs = f"random-{seed}"
    metrics = folder / runs / "small" / "metrics.jsonl"
    for _ in range(4):
        before = _lines(metrics)
        process = start(context, folder, runs)
        while process.is_alive() and not (metrics.exists() and _lines(metrics) != before):
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.12))
        process.kill()
        finish(process)
    assert finish(start(context, folder, runs)) == 0
    assert_as_if_uninterrupted(folder, runs)


def _lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.slow
def test_a_corrupted_checkpoint_is_passed_over(folder, context):
    moment = ("os.rename", "step-00000010", 1)
    assert finish(start(context, folder, "corrupted", moment)) == -signal.SIGKILL
    checkpoints = folder / "corrupted/small/checkpoints"
    newest = checkpoints / "step-00000008" / "tensors.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-100] ^= 16
    newest.write_bytes(raw)
    assert finish(start(context, folder, "corrupted")) == 0
    assert_as_if_uninterrupted(folder, "corrupted")
    assert (checkpoints / "step-00000008.damaged").exists()


@pytest.mark.slow
def test_a_folder_of_another_run_is_refused_by_the_path_that_differs(folder, monkeypatch):
    monkeypatch.setenv("NEMOTRON3_CACHE", str(folder / "cache"))
    other = with_leaf(run_in(folder), "training.optimizer.lr", 2e-2)
    with pytest.raises(
        ConfigError, match=r"\(1 differ, first training\.optimizer\.lr: 0\.01 there"
    ):
        pretrain(other, runs=folder / "whole")


@pytest.mark.slow
def test_a_finished_run_is_shown_and_not_repeated(folder, monkeypatch):
    monkeypatch.setenv("NEMOTRON3_CACHE", str(folder / "cache"))

    class Listener(RunCallback):
        stages: list[str] = []  # noqa: RUF012

        def stage(self, message: str) -> None:
            self.stages.append(message)

    run = folder / "whole" / "small"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    summary = pretrain(run_in(folder), runs=folder / "whole", callback=Listener())
    assert summary == read_summary(run, PretrainSummary)
    assert [message.endswith("this is what it showed") for message in Listener.stages] == [True]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
