"""What a reinforcement learning run has to show: its summary and the report's content."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemotron3.config import to_record
from nemotron3.observe.report import ReportSummary, TextSample
from nemotron3.recipes.rl import RLRun
from nemotron3.rl.records import RolloutRecord, means_by_environment
from nemotron3.runtime.devices import describe_device


@dataclass(frozen=True, kw_only=True)
class RLSummary:
    """What a finished run has to show."""

    reward_before: dict[str, float]
    """Mean reward on held-out tasks before training, by environment; "all" for the mean of them."""
    reward: dict[str, float]
    """The same of the result, on the same tasks with the same seeds."""
    tokens_before: dict[str, float]
    """Sampled tokens of a rollout, by environment."""
    tokens: dict[str, float]
    """The same of the result."""
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
    held_out_tasks: int,
    parameters: int,
    seconds: float,
) -> RLSummary:
    """What rollouts of the same tasks before and after training show."""
    firsts = {task.environment: task for task in reversed(after)}
    return RLSummary(
        reward_before=means_by_environment(before, lambda task: task.reward),
        reward=means_by_environment(after, lambda task: task.reward),
        tokens_before=means_by_environment(before, lambda task: float(task.tokens)),
        tokens=means_by_environment(after, lambda task: float(task.tokens)),
        held_out_tasks=held_out_tasks,
        seconds=seconds,
        samples=tuple(
            {"prompt": task.prompt, "text": task.text, "environment": name}
            for name, task in sorted(firsts.items())
        ),
        parameters=parameters,
    )


def rl_report(run: RLRun, summary: RLSummary, device: torch.device) -> ReportSummary:
    """The page of a finished run."""
    return ReportSummary(
        title=f"Reinforcement learning: {run.name}",
        command=" ".join(["nemotron3", *sys.argv[1:]]),
        lead=(
            f"{run.model} trained in {len(run.environments)} environments at once, "
            f"{run.training.steps} updates of {run.training.batch_size} rollouts. "
            f"{describe_device(device)}."
        ),
        facts={
            "parameters": f"{summary.parameters / 1e6:.1f} M",
            "held-out reward before": f"{summary.reward_before['all']:.3f}",
            "held-out reward": f"{summary.reward['all']:.3f}",
            "minutes": f"{summary.seconds / 60:.1f}",
        },
        model_name=run.name,
        samples=[
            TextSample(prompt=f"{s['environment']}: {s['prompt']}\n", text=s["text"])
            for s in summary.samples
        ],
        sources=[
            {
                "environment": name,
                "held-out tasks": summary.held_out_tasks,
                "reward before": round(summary.reward_before[name], 3),
                "reward": round(summary.reward[name], 3),
                "tokens before": round(summary.tokens_before[name], 1),
                "tokens": round(summary.tokens[name], 1),
            }
            for name in summary.reward
            if name != "all"
        ],
        config=to_record(run),
    )
