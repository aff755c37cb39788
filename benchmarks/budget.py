"""Accuracy and tokens of a trained reasoner as functions of its reasoning budget.

    python examples/reasoner.py
    python -m benchmarks.budget runs/reasoner/model

asks the same sums, none of which was in the training data, with every budget, with and without the
grace that lets a line end; at low effort; and without reasoning. Answers are greedy, so the figures
are the same on every machine, up to rounding. It writes a record, a plot, and the table of
docs/reasoning.md.
"""

import argparse
import datetime
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu import RESULTS
from benchmarks.drawing import BLUE, GREEN, INK, ORANGE, pyplot
from benchmarks.machine import command, description
from benchmarks.page import ROOT, fill, table
from examples.sums import problem, question

from nemotron3 import LLM, EngineConfig, SamplingParams
from nemotron3.inference.output_processor import CompletionOutput

PAGE = ROOT / "docs" / "reasoning.md"
DRAWING = ROOT / "docs" / "assets" / "reasoning-budget.svg"
BUDGETS = (0, 4, 8, 16, 24, 32, 40, 48, None)
LINE = 8
"""Grace in tokens that is enough to end a line of the reasoning."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The result of one setting over all problems."""

    name: str
    budget: int | None = None
    grace: int = 0
    accuracy: float
    reasoning_tokens: float
    """Mean over the problems."""
    answer_tokens: float
    most_reasoning_tokens: int


def ask(llm: LLM, problems: list[list[int]], params: SamplingParams, **options: Any) -> list[Any]:
    """The answers to the problems."""
    chats = [[question(numbers)] for numbers in problems]
    return [request.outputs[0] for request in llm.chat(chats, params, **options)]


def point(
    name: str,
    problems: list[list[int]],
    answers: list[CompletionOutput],
    *,
    budget: int | None = None,
    grace: int = 0,
) -> Point:
    """Score the answers."""
    count = len(problems)
    right = sum(a.content.strip() == str(sum(p)) for p, a in zip(problems, answers, strict=True))
    return Point(
        name=name,
        budget=budget,
        grace=grace,
        accuracy=right / count,
        reasoning_tokens=sum(a.num_reasoning_tokens for a in answers) / count,
        answer_tokens=sum(len(a.token_ids) for a in answers) / count,
        most_reasoning_tokens=max(a.num_reasoning_tokens for a in answers),
    )


def measure(llm: LLM, problems: list[list[int]], *, max_tokens: int = 160) -> list[Point]:
    """The results of all settings."""
    points = []
    for grace in (0, LINE):
        for budget in BUDGETS:
            params = SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                reasoning_budget=budget,
                reasoning_grace=grace,
            )
            if budget is None and grace:
                continue
            name = "no limit" if budget is None else f"budget {budget}"
            answers = ask(llm, problems, params)
            points.append(point(name, problems, answers, budget=budget, grace=grace))
    free = SamplingParams(temperature=0, max_tokens=max_tokens)
    points.append(point("low effort", problems, ask(llm, problems, free, effort="low")))
    points.append(point("no thinking", problems, ask(llm, problems, free, enable_thinking=False)))
    return points


def draw(points: list[Point], out: Path) -> None:
    """Plot accuracy over reasoning tokens."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    free = next(p for p in points if p.name == "no limit")
    for grace, colour, label in (
        (0, BLUE, "budget, cut where it ends"),
        (LINE, ORANGE, f"budget, and up to {LINE} tokens to end a line"),
    ):
        curve = [p for p in points if p.budget is not None and p.grace == grace] + [free]
        axes.plot(
            [p.reasoning_tokens for p in curve],
            [p.accuracy for p in curve],
            color=colour,
            marker="o",
            markersize=4,
            linewidth=1.6,
            label=label,
        )
        for p in curve:
            if grace == 0 and p.budget is not None:
                _name(axes, p, str(p.budget), (4, -10))
    for name, colour, marker in (("low effort", GREEN, "D"), ("no thinking", INK, "s")):
        p = next(p for p in points if p.name == name)
        axes.plot(p.reasoning_tokens, p.accuracy, marker, color=colour, label=name)
    _name(axes, free, "no limit", (-18, 6))
    axes.set(
        xlabel="tokens of reasoning (mean)",
        ylabel="right answers",
        ylim=(0, 1.08),
        title="Sums of 2 to 8 digits, by reasoning budget",
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set(fontsize=10, fontweight="bold")
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(out, format="svg", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def _name(axes: Any, point: Point, text: str, offset: tuple[int, int]) -> None:
    axes.annotate(
        text,
        (point.reasoning_tokens, point.accuracy),
        xytext=offset,
        textcoords="offset points",
        fontsize=7.5,
    )


def as_markdown(result: dict[str, Any]) -> str:
    """The record as a Markdown table."""
    points = [Point(**p) for p in result["points"]]
    by_budget: dict[str, list[Point]] = {}
    for p in points:
        by_budget.setdefault(p.name, []).append(p)
    rows = [["", "right", "reasoning tokens", f"right, grace {LINE}", "reasoning tokens"]]
    for name, both in by_budget.items():
        cells = [c for p in both for c in (f"{p.accuracy:.1%}", f"{p.reasoning_tokens:.1f}")]
        rows.append([name, *cells, *[""] * (4 - len(cells))])
    machine = result["machine"]
    return (
        f"`{result['command']}` at commit {machine['commit']}, {result['date']}: "
        f"{result['problems']} problems, greedy; PyTorch {machine['torch']} on a CPU.\n\n"
        f"{table(rows)}"
    )


def main() -> None:
    """Measure, write the record and the table, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", default=Path("runs/reasoner/model"))
    parser.add_argument("--problems", type=int, default=500)
    arguments = parser.parse_args()
    draw_from = random.Random(1)
    problems = [problem(draw_from, held_out=True) for _ in range(arguments.problems)]
    points = measure(LLM(arguments.model, config=EngineConfig(max_num_seqs=64)), problems)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    result = {
        "command": command("benchmarks.budget"),
        "date": date,
        "machine": description(),
        "problems": len(problems),
        "points": [asdict(p) for p in points],
    }
    text = as_markdown(result)
    (RESULTS / f"budget-{date}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(points, DRAWING)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), "budget", text), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
