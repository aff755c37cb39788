"""What a reinforcement learning run has to show: its summary and the report's content.

A gain counts where it is the task's own. Held-out tasks are played before and after training, each
environment is judged by a paired test (all of them as one family), and beside the rewards stand the
share of the most common answer and the rewards by what the right answer was: a policy that answers
"unknown" to everything is seen there.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron3.config import to_record
from nemotron3.evaluation.environments import EnvironmentResult, results_by_environment
from nemotron3.evaluation.statistics import judge
from nemotron3.observe.metrics import read_metrics
from nemotron3.observe.report import ReportSummary, TextSample
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.run_folder import METRICS_FILE, ROLLOUTS_FILE
from nemotron3.rl.records import (
    AFTER_TRAINING,
    BEFORE_TRAINING,
    RolloutRecord,
    means_by_environment,
)
from nemotron3.runtime.devices import describe_device

_FAILED = "rollouts/failed/"
SMALLEST_EFFECT = 0.05
"""The smallest gain in mean reward that matters."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """What training changed in one environment, on the same held-out tasks."""

    num_tasks: int
    """Tasks that have a reward both times."""
    difference: float
    low: float
    """Of the interval that holds the differences of all environments at 95%."""
    high: float
    p_value: float
    """Corrected for the number of environments (Holm)."""
    verdict: str
    """Whether the claim "better" holds, does not hold, or cannot be told."""


@dataclass(frozen=True, kw_only=True)
class RunFailures:
    """Rollouts of an environment that have no reward because something failed."""

    held_out: int
    """Of the tasks before and after training."""
    training: int
    """Of those that updates were to be made of."""
    example: str
    """Why one of them failed."""


@dataclass(frozen=True, kw_only=True)
class RLSummary:
    """What a finished run has to show."""

    reward_before: dict[str, float]
    """Mean reward on held-out tasks before training, by environment; "all" for the mean of them."""
    reward: dict[str, float]
    """The same of the result, on the same tasks with the same seeds."""
    gains: dict[str, Gain]
    """The difference, by environment."""
    tokens_before: dict[str, float]
    """Sampled tokens of a rollout, by environment."""
    tokens: dict[str, float]
    """The same of the result."""
    most_common_before: dict[str, float]
    """Share of the most common answer, by environment."""
    most_common: dict[str, float]
    """The same of the result."""
    by_label: dict[str, dict[str, tuple[float, float]]]
    """Rewards before and after of the tasks with each label ("is_answerable: no"), by environment,
    where a label has few values."""
    failures: dict[str, RunFailures]
    """What failed, by environment; those where nothing did are left out."""
    held_out_tasks: int
    """Different held-out prompts of each environment."""
    seconds: float
    """Wall time of this call."""
    samples: tuple[dict[str, str], ...]
    """Held-out tasks and what the result did with them."""
    parameters: int
    """Parameters, with multi-token prediction."""


def rl_summary(
    before: Sequence[RolloutRecord],
    after: Sequence[RolloutRecord],
    *,
    failures: dict[str, RunFailures],
    held_out_tasks: int,
    parameters: int,
    seconds: float,
) -> RLSummary:
    """What rollouts of the same tasks before and after training show."""
    firsts = {record.environment: record for record in reversed(after)}
    results_before, results = results_by_environment(before), results_by_environment(after)
    return RLSummary(
        reward_before=means_by_environment(before, lambda record: record.reward),
        reward=means_by_environment(after, lambda record: record.reward),
        gains=_gains(before, after),
        tokens_before=means_by_environment(before, lambda record: float(record.tokens)),
        tokens=means_by_environment(after, lambda record: float(record.tokens)),
        most_common_before={name: r.top_answer_share for name, r in results_before.items()},
        most_common={name: r.top_answer_share for name, r in results.items()},
        by_label={name: _by_label(results_before[name], r) for name, r in results.items()},
        failures=failures,
        held_out_tasks=held_out_tasks,
        seconds=seconds,
        samples=tuple(
            {"prompt": record.prompt, "text": record.text, "environment": name}
            for name, record in sorted(firsts.items())
        ),
        parameters=parameters,
    )


def run_failures(folder: Path) -> dict[str, RunFailures]:
    """What failed in a run, by the rollouts and metrics in its folder."""
    held_out: Counter[str] = Counter()
    training: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for line in (folder / ROLLOUTS_FILE).read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["failure"] is not None:
            name = record["environment"]
            examples.setdefault(name, record["failure"])
            held_out[name] += record["when"] in (BEFORE_TRAINING, AFTER_TRAINING)
    for _, metrics in read_metrics(folder / METRICS_FILE):
        for key, value in metrics.items():
            if key.startswith(_FAILED) and value:
                training[key.removeprefix(_FAILED)] += round(value)
    return {
        name: RunFailures(
            held_out=held_out[name], training=training[name], example=examples.get(name, "")
        )
        for name in sorted(examples.keys() | training.keys())
    }


def _gains(before: Sequence[RolloutRecord], after: Sequence[RolloutRecord]) -> dict[str, Gain]:
    """By the tasks that have a reward both times."""
    rewards_before = {record.task: record.reward for record in before}
    rewards: dict[str, tuple[list[float], list[float]]] = {}
    for record in after:
        first = rewards_before.get(record.task)
        if first is not None and record.reward is not None:
            pair = rewards.setdefault(record.environment, ([], []))
            pair[0].append(first)
            pair[1].append(record.reward)
    return {
        name: Gain(
            num_tasks=finding.comparison.n,
            difference=finding.comparison.difference,
            low=finding.comparison.interval.low,
            high=finding.comparison.interval.high,
            p_value=finding.adjusted_p,
            verdict=finding.verdict.value,
        )
        for name, finding in judge(rewards, smallest_effect=SMALLEST_EFFECT).items()
    }


def _by_label(
    before: EnvironmentResult, after: EnvironmentResult
) -> dict[str, tuple[float, float]]:
    return {
        f"{label}: {value}": (first.mean, after.by_label[label][value].mean)
        for label, values in before.by_label.items()
        for value, first in values.items()
        if value in after.by_label.get(label, {})
    }


def rl_report(run: RLRun, summary: RLSummary, device: torch.device) -> ReportSummary:
    """The page of a finished run."""
    better = sum(gain.verdict == "holds" for gain in summary.gains.values())
    return ReportSummary(
        title=f"Reinforcement learning: {run.name}",
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        lead=(
            f"{run.model} trained in {len(run.environments)} environments at once, "
            f"{run.training.steps} updates of {run.training.batch_size} rollouts. "
            f"{describe_device(device)}. rollouts.html shows what the model did and why it was "
            "rewarded."
        ),
        facts={
            "parameters": f"{summary.parameters / 1e6:.1f} M",
            "held-out reward before": f"{summary.reward_before['all']:.3f}",
            "held-out reward": f"{summary.reward['all']:.3f}",
            "significantly better": f"{better} of {len(summary.gains)}",
            "minutes": f"{summary.seconds / 60:.1f}",
        },
        model_name=run.name,
        samples=[
            TextSample(prompt=f"{s['environment']}: {s['prompt']}\n", text=s["text"])
            for s in summary.samples
        ],
        tables={
            "Held-out tasks, before and after": [_row(summary, name) for name in summary.gains],
            "Rollouts without a reward, because something failed": [
                {
                    "environment": name,
                    "held-out": failed.held_out,
                    "training": failed.training,
                    "one of them": failed.example,
                }
                for name, failed in summary.failures.items()
            ],
            "Rewards by the task's kind": [
                {
                    "environment": name,
                    "tasks with": label,
                    "before": round(first, 3),
                    "after": round(second, 3),
                }
                for name, labels in summary.by_label.items()
                for label, (first, second) in labels.items()
            ],
        },
        config=to_record(run),
    )


def _row(summary: RLSummary, name: str) -> dict[str, str | int | float]:
    gain = summary.gains[name]
    return {
        "environment": name,
        "tasks": gain.num_tasks,
        "before": round(summary.reward_before[name], 3),
        "after": round(summary.reward[name], 3),
        "difference": f"{gain.difference:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
        "p (Holm)": f"{gain.p_value:.2g}",
        "better": gain.verdict,
        "most common answer": (
            f"{summary.most_common_before[name]:.0%} > {summary.most_common[name]:.0%}"
        ),
        "tokens": f"{summary.tokens_before[name]:.0f} > {summary.tokens[name]:.0f}",
    }
