"""Put the committed result of a study into its page of the documentation.

    python -m benchmarks.studies runs/studies/simultaneous-rl/result.json   # commit a result
    python -m benchmarks.studies                                            # fill the page again

Everything measured on the page comes from this program; without a result it says so.
"""

import argparse
import json
from pathlib import Path

from benchmarks.cpu import RESULTS
from benchmarks.drawing import BLUE, GREEN, INK, ORANGE, pyplot
from benchmarks.page import NOTHING, ROOT, fill

from nemotron3.config import from_record, write_json
from nemotron3.studies.simultaneous_rl.arms import Arm
from nemotron3.studies.simultaneous_rl.page import as_markdown, curves
from nemotron3.studies.simultaneous_rl.result import StudyResult

PAGE = ROOT / "docs" / "studies" / "simultaneous-rl.md"
DRAWING = ROOT / "docs" / "assets" / "simultaneous-rl.svg"
RESULT = RESULTS / "study-simultaneous-rl.json"
_STYLES = ((BLUE, "-"), (BLUE, "--"), (ORANGE, "-"), (ORANGE, "--"), (GREEN, "-"))
"""Of the arms, in their order: trained at once in one colour, in stages in another."""


def filled(text: str, result: StudyResult | None) -> str:
    """The text of the page with the result between its marks."""
    if result is None:
        return fill(text, "result", NOTHING)
    caption = "Held-out reward while training, mean of the environments and seeds"
    return fill(text, "result", f"![{caption}](../assets/{DRAWING.name})\n\n{as_markdown(result)}")


def draw(result: StudyResult, out: Path) -> None:
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


def read_result(file: Path) -> StudyResult:
    """The result that a study has written."""
    return from_record(StudyResult, json.loads(file.read_text(encoding="utf-8")))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", help="result.json of a finished study")
    given = parser.parse_args().result
    if given is not None:
        write_json(RESULT, read_result(given))
    result = read_result(RESULT) if RESULT.exists() else None
    if result is not None:
        draw(result, DRAWING)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
