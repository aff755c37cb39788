"""The benchmark of overlapped reinforcement learning: its ways, its ratios, its file."""

import json

import pytest

from benchmarks import rl_overlap
from nemotron3.recipes import run_rl
from nemotron3.rl.sampling_plan import EnvironmentConfig
from tests.rl.playground import save_policy


@pytest.mark.long
def test_every_way_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_overlap, "PAUSE_S", 0.0)
    monkeypatch.setattr(run_rl, "write_report", lambda *_, **__: None)
    tiny_rl = rl_overlap.tiny_rl
    one = (EnvironmentConfig(name="letter_counting", difficulty=0.0),)
    monkeypatch.setattr(
        rl_overlap, "tiny_rl", lambda: rl_overlap.replace(tiny_rl(), environments=one)
    )
    model = save_policy(tmp_path / "model")
    sizes = ["--steps", "4", "--prompts", "2", "--rounds", "1"]
    rl_overlap.main([str(model), *sizes, "--out", str(tmp_path)])
    (written,) = tmp_path.glob("rl_overlap-*.json")
    result = json.loads(written.read_text())
    assert result["ratio_to_turns"].keys() == rl_overlap.WAYS.keys()
    assert result["ratio_to_turns"][rl_overlap.BY_TURNS] == 1.0
    assert all(rate > 0 for rates in result["updates_per_minute"].values() for rate in rates)
    assert result["last_update"][rl_overlap.BY_TURNS]["policy/current"] == 1.0
