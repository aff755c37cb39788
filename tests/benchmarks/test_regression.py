"""Two checkouts are compared in turns; a slower row is reported and fails the command."""

import json

import pytest
from benchmarks.regression import ROWS, median_interval

from benchmarks import regression, regression_worker, timing


class Steady:
    """A double for a checkout whose rows always take the same time."""

    def __init__(self, checkout, _):
        self.seconds = 1.0 if checkout == regression.ROOT else 0.5

    def turn(self, _, row):
        return self.seconds if row == "decode 1" else 1.0

    def close(self):
        pass


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(regression, "PAUSE_S", 0.0)
    monkeypatch.setattr(timing, "TURN_S", 0.0)


def test_a_slower_row_fails_and_all_rows_are_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(regression, "Worker", Steady)
    command = ["--against", "HEAD", "--models", "tiny", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 of 5 rows are slower than HEAD"):
        regression.main(command)
    (file,) = tmp_path.iterdir()
    figures = json.loads(file.read_text())["figures"]
    assert {f["row"]: f["ratio"] for f in figures} == {
        row: 0.5 if row == "decode 1" else 1.0 for row in ROWS["tiny"]
    }
    assert "decode 1      0.500 (0.500 to 0.500)   SLOWER" in capsys.readouterr().out
    regression.main([*command, "--rows", "decode 8"])
    assert len(json.loads(file.read_text())["figures"]) == len(figures)


def test_the_interval_holds_the_median_and_narrows():
    few = median_interval([0.9, 1.0, 1.1, 1.2])
    many = median_interval([0.9, 1.0, 1.1, 1.2] * 20)
    assert few[0] < many[0] <= 1.05 <= many[1] < few[1]


@pytest.mark.parametrize("row", ["train 8", "prefill 8", "decode 2", "engine 8"])
def test_every_kind_of_row_runs(row):
    assert regression_worker.contestant("toy", row)() > 0
