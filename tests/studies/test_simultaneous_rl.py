"""The whole study on toy environments: resuming, equal budgets, what is refused."""

import shutil
from dataclasses import replace

import pytest

from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.cli.main import main
from nemotron3.errors import ConfigError, DivergenceError
from nemotron3.recipes import run_rl
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.studies.simultaneous_rl import cell as cells
from nemotron3.studies.simultaneous_rl.arms import Arm, Cell
from nemotron3.studies.simultaneous_rl.cell import HeldOut, run_cell
from nemotron3.studies.simultaneous_rl.run import simultaneous_rl
from tests.rl.playground import save_policy
from tests.studies.toy import toy_study

_SAVE = CheckpointStore.save


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(
        run_rl, "write_report", lambda folder, **_: (folder / "report.html").touch()
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy") / "model")


def die_at_save(monkeypatch, number):
    """Every process is killed at its n-th checkpoint, when that stands; None for never."""
    saved = []

    def save(self, step, **content):
        _SAVE(self, step, **content)
        saved.append(step)
        if len(saved) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "save", save)


def train(study, arm, work, **changes):
    held_out = HeldOut(study.run, num_tasks=study.held_out_tasks)
    start = held_out.play(updates=0)
    return run_cell(
        study,
        Cell(arm=arm, learning_rate=1e-2, seed=1),
        steps=study.steps,
        start=start,
        held_out=held_out,
        work=work,
        callback=RunCallback(),
        **changes,
    )


@pytest.mark.parametrize(
    ("arm", "dies_at"),
    [pytest.param(Arm.REPLAY, 2, marks=pytest.mark.slow), (Arm.SIMULTANEOUS, 1)],
)
def test_a_cell_that_was_killed_goes_on_to_the_same_result(
    policy, tmp_path, monkeypatch, arm, dies_at
):
    study = toy_study(policy, tmp_path)
    whole = train(study, arm, tmp_path / "whole")
    die_at_save(monkeypatch, dies_at)
    with pytest.raises(KeyboardInterrupt):
        train(study, arm, tmp_path / "cut")
    die_at_save(monkeypatch, None)
    cut = train(study, arm, tmp_path / "cut")
    assert replace(cut, seconds=0.0) == replace(whole, seconds=0.0)
    assert [evaluation.updates for evaluation in whole.evaluations] == [0, 2, 4]
    assert whole.rollouts == study.steps * study.run.training.batch_size
    assert len(whole.grad_norms) == study.steps
    assert whole.tokens > 0
    changed = whole.evaluations[0].scores != whole.evaluations[-1].scores
    assert changed, "training moved nothing, so that nothing was compared"


def test_training_that_diverges_is_a_result(policy, tmp_path, monkeypatch):
    study = toy_study(policy, tmp_path)
    parts = []

    def diverge(run, **given):
        parts.append(run.name)
        if len(parts) == 2:
            raise DivergenceError("the gradient is nan")
        return run_rl.rl(run, **given)

    monkeypatch.setattr(cells, "rl", diverge)
    found = train(study, Arm.STAGED, tmp_path / "work")
    assert found.failure == "DivergenceError: the gradient is nan"
    assert [evaluation.updates for evaluation in found.evaluations] == [0, 2]
    assert len(found.grad_norms) == 2


def test_a_missing_model_is_told_how_to_make(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["study", "simultaneous-rl"]) == 2
    assert "no model in runs/tiny-sft/model; make run STAGE=sft makes it" in capsys.readouterr().err
    assert main(["study", "simultaneous-rl", "--model", "nothing"]) == 2
    assert "no model in nothing; give a model that answers" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command_line_lists_explains_and_refuses(capsys):
    assert main(["study", "list"]) == 0
    assert "simultaneous-rl  is it better" in capsys.readouterr().out
    for options, said in (
        (["--seeds", "0"], "--seeds is 0; it must be 1 or more"),
        (["--steps", "10"], "--steps is 10; every one of the 9 environments"),
        (["--quick", "--steps", "10"], "--steps is 10; every one of the 4 environments"),
        (["--learning-rates", "1e-3", "1e-3"], "--learning-rates is (0.001, 0.001)"),
        (["--held-out-tasks", "0"], "--held-out-tasks is 0"),
        (["--jobs", "0"], "--jobs is 0; it must be 1 or more"),
    ):
        assert main(["study", "simultaneous-rl", *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_a_whole_study_is_resumed_extended_and_published(policy, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(policy, model)
    study = toy_study(str(model), tmp_path)
    runs = tmp_path / "runs"
    die_at_save(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        simultaneous_rl(study, runs=runs, jobs=1)
    die_at_save(monkeypatch, None)
    one = simultaneous_rl(study, runs=runs, jobs=1)
    assert {done.cell.arm for done in one.cells} == set(Arm)
    assert len({done.rollouts for done in one.cells if done.failure is None}) == 1
    assert one.plan.smallest_effect.deviations is None
    assert {found.better for found in one.findings} == {"cannot be told"}
    two = simultaneous_rl(replace(study, num_seeds=2), runs=runs)
    assert two.cells[: len(one.cells)] == one.cells
    assert len(two.cells) == 2 * len(one.cells)
    assert {found.num_seeds for found in two.findings} == {2}
    folder = runs / "studies" / study.name
    assert "staged-reversed" in (folder / "report.html").read_text()
    assert "### Every cell" in (folder / "report.md").read_text()
    assert not any((folder / "work").iterdir())
    with pytest.raises(ConfigError, match=r"other settings .1 differ, first replay: 0\.2 there"):
        simultaneous_rl(replace(study, replay=0.3), runs=runs)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.raises(ConfigError, match="begun with other inputs"):
        simultaneous_rl(study, runs=runs)
