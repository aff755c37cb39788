"""The benchmark of updates in six minutes: what it runs, and its file."""

import json
from dataclasses import replace

from benchmarks import rl_overlap, rl_rate
from nemotron3.rl.rollouts import RolloutConfig
from nemotron3.rl.sampling_plan import EnvironmentConfig
from tests.rl.playground import save_policy


def test_every_kind_of_tasks_is_measured_in_every_way(tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{name}.py" for name in ("Parity", "OtherParity")]
    for file in files:
        text = f"from tests.rl import playground\n\nclass Own(playground.{file.stem}):\n    pass\n"
        file.write_text(text, encoding="utf-8")
    few = tuple(EnvironmentConfig(name=str(file)) for file in files)
    tiny_rl = replace(
        rl_rate.tiny_rl(),
        environments=few,
        rollouts=RolloutConfig(max_tokens=4, max_context=100),
    )
    for module in (rl_rate, rl_overlap):
        monkeypatch.setattr(module, "tiny_rl", lambda: tiny_rl)
    monkeypatch.setitem(rl_rate.TASKS, "short answers", (str(files[0]),))
    monkeypatch.setattr(rl_rate, "PAUSE_S", 0.0)
    monkeypatch.setattr(rl_rate, "PROMPTS", 9)
    monkeypatch.setattr(rl_rate, "pretraining_rate", lambda: 7_500.0)
    measured = []

    def updates_per_minute(run):
        measured.append(run)
        return 60.0, {"rollouts/tokens": 12.0}

    monkeypatch.setattr(rl_rate, "updates_per_minute", updates_per_minute)
    model = save_policy(tmp_path / "model")
    rl_rate.main([str(model), "--steps", "4", "--rounds", "1", "--out", str(tmp_path)])

    assert {(len(run.environments), run.asynchronous.is_ahead) for run in measured} == {
        (count, ahead) for count in (1, 2) for ahead in (False, True)
    }
    assert all(run.training.batch_size == 72 and run.max_rounds == 1 for run in measured)
    (written,) = tmp_path.glob("rl_rate-*.json")
    result = json.loads(written.read_text())
    trainer = result["trainer_seconds"]
    assert trainer["shared tokens"] < trainer["whole tokens"]
    assert min(trainer.values()) > 0
    assert "360 updates of 72 rollouts in 6 minutes (12.0 tokens an answer)" in (
        capsys.readouterr().out
    )
