"""Plots take three quarters of a small run's time; they have tests of their own."""

from collections.abc import Iterator

import pytest

from nemotron3.recipes import run_pretrain, run_rl
from tests.recipes.small_rl import LETTER
from tests.rl.playground import save_policy


@pytest.fixture(scope="module", autouse=True)
def _without_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (run_pretrain, run_rl):
            patch.setattr(
                module, "write_report", lambda folder, **_: (folder / "report.html").touch()
            )
        yield


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A model directory with random weights that can chat."""
    return save_policy(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture
def letter(tmp_path):
    """The path of a user's own environment."""
    file = tmp_path / "letter.py"
    file.write_text(LETTER, encoding="utf-8")
    return str(file)
