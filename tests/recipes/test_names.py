"""What users name their environments and files, in every file that a run leaves."""

import html
import json

import pytest

from nemotron3.cli.compare import compare_command
from nemotron3.errors import ConfigError
from nemotron3.evaluation.environments import environments_by_name
from nemotron3.observe import report
from nemotron3.recipes import run_rl
from nemotron3.recipes.run_rl import rl
from nemotron3.recipes.run_sft import sft
from tests.recipes.small_rl import LETTER, metrics_of
from tests.recipes.small_rl import small as small_rl
from tests.recipes.test_sft import base, rows
from tests.recipes.test_sft import small as small_sft
from tests.rl.playground import Parity

__all__ = ["base"]


class Options:
    def __init__(self, runs, out):
        self.runs, self.out, self.smallest_effect, self.alpha = runs, out, 0.1, 0.05


def compared(folder, capsys):
    """What `compare` prints and writes of a run and its copy."""
    other = folder.with_name("other")
    other.symlink_to(folder)
    out = folder / "compare.html"
    compare_command(Options([folder, other], out))
    return capsys.readouterr().out, out.read_text("utf-8")


@pytest.mark.parametrize("name", ["reasoning_gym:chain_sum", "my <task> & ß"])
def test_an_environment_of_any_printable_name_is_trained_on(
    policy, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setattr(run_rl, "write_report", report.write_report)
    file = tmp_path / "own.py"
    file.write_text(LETTER.replace('"letter"', json.dumps(name)), encoding="utf-8")
    summary = rl(small_rl(policy, str(file)), runs=tmp_path / "runs")
    assert set(summary.reward) == {"all", name}
    folder = tmp_path / "runs" / "small"
    for metrics in metrics_of(folder).values():
        assert {f"reward/mean/{name}", f"rollouts/tokens/{name}"} <= metrics.keys()
    for page in ("report.html", "rollouts.html"):
        assert html.escape(name) in (folder / page).read_text("utf-8")
    said, page = compared(folder, capsys)
    assert f"reward, {name}" in said
    assert html.escape(f"reward/mean/{name}") in page


@pytest.mark.parametrize("name", ["my chats (v2)", "großes", "數學 <b>"])
def test_conversations_in_a_file_of_any_printable_name_are_trained_on(base, tmp_path, capsys, name):
    chats = tmp_path / f"{name}.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows(12)), encoding="utf-8")
    summary = sft(small_sft(base, chats), runs=tmp_path / "runs")
    assert set(summary.loss) == {"all", name}
    folder = tmp_path / "runs" / "small"
    assert any(f"eval/loss/{name}" in metrics for metrics in metrics_of(folder).values())
    assert html.escape(name) in (folder / "report.html").read_text("utf-8")
    said, page = compared(folder, capsys)
    assert f"held-out loss, {name}" in said
    assert html.escape(f"eval/loss/{name}") in page


@pytest.mark.parametrize("name", ["", " ", "a\nb", "all", "a//b"])
def test_environments_whose_results_could_not_be_named_are_refused(name):
    environment = Parity()
    environment.name = name
    with pytest.raises(ConfigError, match="cannot name its results"):
        environments_by_name([environment])
