"""The load test, on a real server and on none: faults are noticed, results recorded."""

import json

import pytest

from benchmarks import load
from tests.inference.texts import text_model, tokenizer


@pytest.mark.long
def test_a_short_storm_is_weathered_and_recorded(tmp_path, capsys):
    text_model().save_pretrained(tmp_path / "model")
    tokenizer().save(tmp_path / "model")
    options = ["--seconds", "4", "--clients", "2", "12", "--threads", "1"]
    assert load.main([str(tmp_path / "model"), *options, "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("load-*.json")
    result = json.loads(written.read_text())
    assert result["at_rest"]
    assert result["clients"]["12"]["whole"] > 5
    assert result["clients"]["12"]["left_early"] > 0
    assert "12 clients" in capsys.readouterr().out


def test_a_wrong_or_a_lost_answer_is_noticed():
    storm = load.Storm()
    request = load.Request("/nowhere", {})
    load.client(
        9, [request], [[1, 2]], storm, seed=0, until=load.time.monotonic() + 0.05, leaves=0.0
    )
    assert storm.failed
    assert storm.summary(1.0)["failed"] == len(storm.failed)
