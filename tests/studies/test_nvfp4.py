"""The whole study on a toy model: pairs, resuming, what is refused."""

from dataclasses import replace

import pytest

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.data import prepare_corpus
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.studies.nvfp4.arms import Arm, Cell
from nemotron3.studies.nvfp4.cell import run_cell
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
    assert [point.step for point in baseline.bits_per_byte] == [2, 4, 6, 8]
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
    assert [point.step for point in recipe.zero_gradients] == [2, 4, 6, 8]


@pytest.mark.parametrize("dies_at", [1, 3])
def test_a_cell_that_was_killed_goes_on_to_the_same_result(tmp_path, monkeypatch, dies_at):
    """Before and after the forward pass is switched to high precision, at the sixth update."""
    study = toy_study(tmp_path)
    whole = train(study, Arm.LATE_SWITCH, tmp_path / "whole")
    die_at_save(monkeypatch, dies_at)
    with pytest.raises(KeyboardInterrupt):
        train(study, Arm.LATE_SWITCH, tmp_path / "cut")
    die_at_save(monkeypatch, None)
    cut = train(study, Arm.LATE_SWITCH, tmp_path / "cut")
    assert replace(cut, seconds=0.0) == replace(whole, seconds=0.0)
    assert whole != train(study, Arm.RECIPE, tmp_path / "recipe")
