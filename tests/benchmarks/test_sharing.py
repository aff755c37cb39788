"""The benchmark of a shared machine: its processes, its lines, its file."""

import json

import pytest

from benchmarks import sharing
from tests.ops.native import needs_compiler


def test_lines_have_medians_and_ranges():
    taken = [{"share": share, "training alone": 10 * share} for share in (0.5, 0.7, 0.4)]
    line = {"share": 0.5, "training alone": 5.0, "share_min": 0.4, "share_max": 0.7}
    assert sharing.table({"one": taken}) == {"one": line}


@needs_compiler
@pytest.mark.long
@pytest.mark.timeout(200)
def test_everything_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sharing, "BUSY", (1,))
    monkeypatch.setattr(sharing, "GROUPS", {"both": ("decoding", "training")})
    sharing.main(["--seconds", "0.01", "--repeats", "1", "--out", str(tmp_path)])
    (written,) = tmp_path.glob("sharing-*.json")
    lines = json.loads(written.read_text())["lines"]
    assert {f"{kind} beside 1 busy" for kind in sharing.KINDS} | {"both"} <= lines.keys()
    assert all(line["share"] > 0 for line in lines.values())
