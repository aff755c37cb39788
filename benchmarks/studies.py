"""Put the committed results of studies into their pages of the documentation.

    python -m benchmarks.studies runs/studies/nvfp4/result.json   # commit a result
    python -m benchmarks.studies                                  # fill all pages again

Everything measured on the pages comes from this program; without a result a page says so.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu import RESULTS
from benchmarks.drawing import BLUE, GREEN, INK, ORANGE, pyplot
from benchmarks.page import NOTHING, ROOT, fill

from nemotron3.config import from_record, write_json
from nemotron3.studies.nvfp4 import page as nvfp4_page
from nemotron3.studies.nvfp4.result import StudyResult as NVFP4Result
from nemotron3.studies.simultaneous_rl import page as simultaneous_rl_page
from nemotron3.studies.simultaneous_rl.arms import Arm
from nemotron3.studies.simultaneous_rl.page import curves
from nemotron3.studies.simultaneous_rl.result import StudyResult as SimultaneousRLResult
from nemotron3.studies.study import Published


@dataclass(frozen=True, kw_only=True)
class StudyDocs:
    """A study in the documentation."""

    name: str
    """Of its page, its drawing and its committed result."""
    cls: type[Published]
    """Of its result."""
    as_markdown: Callable[[Any], str]
    draw: Callable[[Any, Path], None]
    caption: str
    """Of the drawing."""

    @property
    def page(self) -> Path:
        """The page, with marks between which the result is written."""
        return ROOT / "docs" / "studies" / f"{self.name}.md"

    @property
    def drawing(self) -> Path:
        """The plot beside the result."""
        return ROOT / "docs" / "assets" / f"{self.name}.svg"

    @property
    def committed(self) -> Path:
        """The result that the page shows."""
        return RESULTS / f"study-{self.name}.json"

    def filled(self, text: str, result: Published | None) -> str:
        """The text of the page with the result between its marks."""
        if result is None:
            return fill(text, "result", NOTHING)
        drawn = f"![{self.caption}](../assets/{self.drawing.name})"
        return fill(text, "result", f"{drawn}\n\n{self.as_markdown(result)}")


_STYLES = ((BLUE, "-"), (BLUE, "--"), (ORANGE, "-"), (ORANGE, "--"), (GREEN, "-"))
"""Of the arms, in their order: trained at once in one colour, in stages in another."""


def draw_simultaneous_rl(result: SimultaneousRLResult, out: Path) -> None:
    """Plot mean held-out reward by updates: a panel for each learning rate, a curve an arm."""
    plt = pyplot()
    rates = result.study.learning_rates
    figure, panels = plt.subplots(
        1,
        len(rates),
        figsize=(3.1 * len(rates) + 1.6, 3.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, rate in zip(panels[0], rates, strict=True):
        axes.axhline(result.timing.start.mean, color=INK, linewidth=0.8, linestyle=":")
        for one in curves(result, rate, lambda evaluation: evaluation.mean):
            colour, style = _STYLES[[*Arm].index(Arm(one.label))]
            axes.plot(one.steps, one.values, style, color=colour, linewidth=1.6, label=one.label)
        axes.set(xlabel="updates", title=f"learning rate {rate:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set(fontsize=10, fontweight="bold")
    panels[0][0].set(ylabel="held-out reward")
    drawn = [axes.get_legend_handles_labels() for axes in panels[0]]
    named = {label: handle for some in drawn for handle, label in zip(*some, strict=True)}
    figure.legend(named.values(), named.keys(), frameon=False, loc="outside right center")
    figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def draw_nvfp4(result: NVFP4Result, out: Path) -> None:
    """Plot each arm's difference to the baseline with its 95% interval, a panel a measure."""
    plt = pyplot()
    size = (3.6 * len(nvfp4_page.MEASURES) + 1.6, 4.2)
    figure, panels = plt.subplots(
        1, len(nvfp4_page.MEASURES), figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, measure in zip(panels[0], nvfp4_page.MEASURES, strict=True):
        shown = nvfp4_page.gap_ranges(result, measure)[::-1]
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        for row, one in enumerate(shown):
            colour = BLUE if one.is_strong else ORANGE
            if math.isfinite(one.low):
                axes.plot([one.low, one.high], [row, row], color=colour, linewidth=1.6)
            axes.plot([one.value], [row], "o", color=colour, markersize=4)
        axes.set_yticks(range(len(shown)), [one.label for one in shown])
        axes.set(xlabel="difference in loss, %", title=f"loss {nvfp4_page.MEASURES[measure]}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set(fontsize=9, fontweight="bold")
    figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


STUDIES = {
    "rl": StudyDocs(
        name="simultaneous-rl",
        cls=SimultaneousRLResult,
        as_markdown=simultaneous_rl_page.as_markdown,
        draw=draw_simultaneous_rl,
        caption="Held-out reward while training, mean of the environments and seeds",
    ),
    "pretrain": StudyDocs(
        name="nvfp4",
        cls=NVFP4Result,
        as_markdown=nvfp4_page.as_markdown,
        draw=draw_nvfp4,
        caption="Difference in held-out loss to the baseline, with 95% intervals over seeds",
    ),
}
"""By the kind of run that their cells are."""


def read_result(file: Path) -> tuple[StudyDocs, Published]:
    """The result that a study has written, and the study that it is of."""
    record = json.loads(file.read_text(encoding="utf-8"))
    docs = STUDIES[record["study"]["run"]["kind"]]
    return docs, from_record(docs.cls, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", help="result.json of a finished study")
    given = parser.parse_args().result
    if given is not None:
        docs, result = read_result(given)
        write_json(docs.committed, result)
    for docs in STUDIES.values():
        result = read_result(docs.committed)[1] if docs.committed.exists() else None
        if result is not None:
            docs.draw(result, docs.drawing)
        docs.page.write_text(docs.filled(docs.page.read_text("utf-8"), result), encoding="utf-8")
        print(docs.page)


if __name__ == "__main__":
    main()
