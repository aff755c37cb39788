"""Put a finished run's picture and output into the documentation.

    .venv/bin/python -m docs.figures runs/tiny

writes docs/assets/tiny-run.svg, and the text between the make-run-output marks of README.md and
docs/tutorial.md. No number of the run stands in the documentation that this did not put there.
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.drawing import BLUE, GREEN, GREY, ORANGE, pyplot

from nemotron3.cli.pretrain import result_text
from nemotron3.config import read_run
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.run_folder import read_summary
from nemotron3.recipes.run_pretrain import PretrainSummary

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "tutorial.md")
MARKS = re.compile(r"(<!-- make-run-output -->\n).*?(\n?<!-- /make-run-output -->)", re.DOTALL)


def main(folder: Path) -> None:
    """Draw and write."""
    draw(folder, ROOT / "docs" / "assets" / "tiny-run.svg")
    run = read_run(folder, PretrainRun)
    machine = json.loads((folder / "run.json").read_text())["extra"]["device"]
    text = result_text(read_summary(folder, PretrainSummary), run, Path("runs") / run.name).strip(
        "\n"
    )
    block = f"```text\n{text}\n```\n\n({machine}; the time includes the corpus, not the set-up.)\n"
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        assert MARKS.search(content), f"{page} has no make-run-output marks"
        page.write_text(MARKS.sub(lambda m: m[1] + block + m[2], content), encoding="utf-8")


def draw(folder: Path, out: Path) -> None:
    """Losses while training beside bits per byte in the end."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.2, 3.3), width_ratios=(3, 2), layout="constrained"
    )
    curves = {
        "train/loss": ("next token", BLUE),
        "train/loss_mtp_1": ("one further (MTP depth 1)", ORANGE),
        "train/loss_mtp_2": ("two further (MTP depth 2)", GREEN),
    }
    points = list(read_metrics(folder / "metrics.jsonl"))
    for name, (label, colour) in reversed(curves.items()):
        steps = [step for step, metrics in points if name in metrics]
        values = [metrics[name] for _, metrics in points if name in metrics]
        left.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
        left.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=label)
    left.set(xlabel="step", ylabel="loss, nats per token", title="Training loss")
    left.legend(frameon=False, reverse=True)
    summary = read_summary(folder, PretrainSummary)
    bits = summary.baselines | {"this model": summary.bits_per_byte}
    names = sorted(bits, key=lambda name: bits[name])
    colours = [BLUE if name == "this model" else GREY for name in names]
    bars = right.barh(names, [bits[name] for name in names], color=colours, height=0.62)
    right.bar_label(bars, fmt="%.2f", padding=4)
    right.set(title="Held-out text, bits per byte", xlim=(0, 1.15 * max(bits.values())))
    right.set_xticks([])
    right.spines["bottom"].set_visible(False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set(fontsize=10, fontweight="bold")
    figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")


def _smooth(values: list[float], half: int = 10) -> list[float]:
    return [
        sum(window) / len(window)
        for window in (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny"))
