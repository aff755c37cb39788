"""Plots take three quarters of a small run's time; they have tests of their own."""

from collections.abc import Iterator

import pytest

from nemotron3.recipes import run_pretrain


@pytest.fixture(scope="module", autouse=True)
def _without_plots() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_pretrain, "write_report", lambda folder, **_: (folder / "report.html").touch()
        )
        yield
