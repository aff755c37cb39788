"""The whole study on a toy model: pairs, resuming, what is refused."""

from dataclasses import replace

import pytest

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.cli.main import main
from nemotron3.data import prepare_corpus
from nemotron3.errors import ConfigError, DivergenceError
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.studies.nvfp4 import cell as cells
from nemotron3.studies.nvfp4 import run
from nemotron3.studies.nvfp4.arms import Arm, Cell
from nemotron3.studies.nvfp4.cell import run_cell
from nemotron3.studies.nvfp4.ingredients import measure_roundings
from nemotron3.studies.nvfp4.run import nvfp4
from tests.studies.toy_nvfp4 import toy_study

_SAVE = CheckpointStore.save


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON3_CACHE", str(tmp_path / "cache"))


def die_at_save(monkeypatch, number):
    """The process is killed at its n-th checkpoint, when that stands; None for never."""
    saved = []

    def save(self, step, **content):
        _SAVE(self, step, **content)
        saved.append(step)
        if len(saved) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "save", save)


def train(study, arm, work, seed=0):
    return run_cell(
        study,
        Cell(arm=arm, seed=seed),
        steps=study.steps,
        corpus=prepare_corpus(study.run.corpus),
        work=work,
        callback=RunCallback(),
    )


def test_two_arms_of_a_seed_differ_by_rounding_alone(tmp_path):
    study = toy_study(tmp_path)
    found = {
        (arm, seed): train(study, arm, tmp_path / f"{arm}-{seed}", seed)
        for arm, seed in [(Arm.BASELINE, 0), (Arm.RECIPE, 0), (Arm.BASELINE, 1)]
    }
    baseline, recipe, other = found.values()
    assert [point.step for point in baseline.bits_per_byte] == [4, 8, 12]
    assert baseline.bits_per_byte[-1].value < baseline.bits_per_byte[0].value
    # Nothing is rounded, so both measures of the baseline are one.
    assert baseline.unrounded == pytest.approx(baseline.bits_per_byte[-1].value, rel=1e-6)
    assert (baseline.flushed, baseline.zero_gradients) == ({}, ())
    gap = recipe.bits_per_byte[-1].value - baseline.bits_per_byte[-1].value
    assert 0 < abs(gap) < 0.05 * baseline.unrounded
    assert recipe.unrounded != recipe.bits_per_byte[-1].value
    assert other.bits_per_byte != baseline.bits_per_byte
    layers = {
        f"{product}_layer_{layer:02d}"
        for product in ("fprop", "dgrad", "wgrad")
        for layer in (0, 1, 2, 4)
    }
    assert set(recipe.flushed) == layers
    assert [point.step for point in recipe.zero_gradients] == [4, 8, 12]


@pytest.mark.parametrize("dies_at", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_cell_that_was_killed_goes_on_to_the_same_result(tmp_path, monkeypatch, dies_at):
    """Before and after the forward pass is switched to high precision, after six updates."""
    study = toy_study(tmp_path)
    whole = train(study, Arm.LATE_SWITCH, tmp_path / "whole")
    die_at_save(monkeypatch, dies_at)
    with pytest.raises(KeyboardInterrupt):
        train(study, Arm.LATE_SWITCH, tmp_path / "cut")
    die_at_save(monkeypatch, None)
    cut = train(study, Arm.LATE_SWITCH, tmp_path / "cut")
    assert replace(cut, seconds=0.0) == replace(whole, seconds=0.0)
    assert whole != train(study, Arm.RECIPE, tmp_path / "recipe")


def test_training_that_diverges_is_a_result(tmp_path, monkeypatch):
    def diverge(*_):
        raise DivergenceError("the gradient is nan")

    monkeypatch.setattr(cells, "train_model", diverge)
    found = train(toy_study(tmp_path), Arm.RECIPE, tmp_path / "work")
    assert found.failure == "DivergenceError: the gradient is nan"
    assert (found.bits_per_byte, found.unrounded) == ((), None)


def test_the_command_line_lists_and_refuses(capsys):
    assert main(["study", "list"]) == 0
    assert "nvfp4  what does training in four bits cost" in capsys.readouterr().out
    for options, said in (
        (["--seeds", "0"], "--seeds is 0; it must be 1 or more"),
        (["--steps", "7"], "--steps is 7; warm-up, plateau and decay take 8 or more"),
        (["--recipe", "tiny-rl"], "recipe tiny-rl is a run of kind 'rl', and a PretrainRun is"),
        (["--jobs", "0"], "--jobs is 0; it must be 1 or more"),
    ):
        assert main(["study", "nvfp4", *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_a_whole_study_is_resumed_extended_and_published(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "measure_roundings", lambda: measure_roundings(2))
    study = toy_study(tmp_path)
    runs = tmp_path / "runs"
    die_at_save(monkeypatch, 40)  # the timing makes 2 in each of 13 runs
    with pytest.raises(KeyboardInterrupt):
        nvfp4(study, runs=runs, jobs=1)
    folder = runs / "studies" / study.name
    finished = {file.name: file.read_bytes() for file in (folder / "cells").iterdir()}
    assert 0 < len(finished) < len(Arm)
    die_at_save(monkeypatch, None)
    one = nvfp4(study, runs=runs, jobs=1)
    assert all((folder / "cells" / name).read_bytes() == held for name, held in finished.items())
    assert [done.cell.arm for done in one.cells] == list(Arm)
    assert {found.verdict for found in one.findings} == {"cannot be told"}
    two = nvfp4(replace(study, num_seeds=2), runs=runs)
    assert two.cells[: len(one.cells)] == one.cells
    assert {found.num_seeds for found in two.findings} == {2}
    assert "without-hadamard" in (folder / "report.html").read_text()
    assert "### Every cell" in (folder / "report.md").read_text()
    assert not any((folder / "work").iterdir())
    with pytest.raises(ConfigError, match=r"other settings .1 differ, first smallest_effect"):
        nvfp4(replace(study, smallest_effect=0.3), runs=runs)
    (tmp_path / "text" / "000.txt").write_text("Another text. It has other words.\n")
    with pytest.raises(ConfigError, match="begun with another text"):
        nvfp4(study, runs=runs)
