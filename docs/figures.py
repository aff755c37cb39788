"""Put the pictures and outputs of `make run` into the documentation.

    .venv/bin/python -m docs.figures runs

writes docs/assets/tiny-run.svg, and the text between marks: of pre-training (make-run-output) the
whole output into docs/tutorial.md, one sample and the comparison into README.md; of reinforcement
learning (make-run-gains) the rewards before and after into README.md, and the whole output into
docs/post-training.md. No other place in the documentation holds numbers of these runs.
"""

import json
import re
import sys
from pathlib import Path

from benchmarks.drawing import BLUE, GREEN, GREY, ORANGE, pyplot

from nemotron3.cli.pretrain import comparison_lines, result_text, sample_lines
from nemotron3.cli.rl import gain_lines
from nemotron3.cli.rl import result_text as rl_text
from nemotron3.config import read_run
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.pretrain import PretrainRun
from nemotron3.recipes.rl_summary import RLSummary
from nemotron3.recipes.run_folder import read_summary
from nemotron3.recipes.run_pretrain import PretrainSummary
from nemotron3.recipes.run_sft import SFTSummary

ROOT = Path(__file__).parent.parent


def main(runs: Path) -> None:
    """Draw and write."""
    folder = runs / "tiny"
    draw(folder, ROOT / "docs" / "assets" / "tiny-run.svg")
    run = read_run(folder, PretrainRun)
    summary = read_summary(folder, PretrainSummary)
    machine = json.loads((folder / "run.json").read_text())["extra"]["device"]
    short = [*sample_lines(summary.samples[0]), "", *comparison_lines(summary, run.name)]
    took = f"{summary.seconds / 60:.1f} minutes"
    _replace_block(ROOT / "README.md", "\n".join(short), f"{machine}: {took}, without the set-up")
    whole = result_text(summary, run, Path("runs") / run.name).strip("\n")
    _replace_block(ROOT / "docs" / "tutorial.md", whole, f"{machine}, without the set-up")
    write_gains(runs, machine)


def write_gains(runs: Path, machine: str) -> None:
    """The rewards before and after the last stage, and how long each stage took."""
    summary = read_summary(runs / "tiny-rl", RLSummary)
    tuned = read_summary(runs / "tiny-sft", SFTSummary)
    took = (
        f"{machine}: fine-tuning {tuned.seconds / 60:.1f} minutes, "
        f"reinforcement learning {summary.seconds / 60:.1f}"
    )
    _replace_block(ROOT / "README.md", "\n".join(gain_lines(summary)), took, name="make-run-gains")
    whole = rl_text(summary, Path("runs") / "tiny-rl").strip("\n")
    page = ROOT / "docs" / "post-training.md"
    _replace_block(page, whole, took, name="make-run-gains")


def _replace_block(page: Path, text: str, note: str, *, name: str = "make-run-output") -> None:
    """Put the output of a run and a note below it between a page's marks."""
    content = page.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- {name} -->\n).*?(\n?<!-- /{name} -->)", re.DOTALL)
    assert marks.search(content), f"{page} has no marks for {name}"
    block = f"```text\n{text}\n```\n\n({note}.)\n"
    page.write_text(marks.sub(lambda m: m[1] + block + m[2], content), encoding="utf-8")


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
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
