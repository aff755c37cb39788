"""`nemotron3 rl`: reinforcement learning by a recipe, or of a model in named environments."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from nemotron3.cli.recipes import with_recipes
from nemotron3.cli.tuning import chosen_run, ending, lora_of, value_of, watched, weighted
from nemotron3.environments.registry import has_environment
from nemotron3.errors import ConfigError
from nemotron3.recipes.input_files import check_model_directory
from nemotron3.recipes.load import has_recipe
from nemotron3.recipes.own_environments import own_environments
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_summary import RLSummary
from nemotron3.recipes.run_rl import rl
from nemotron3.rl.sampling_plan import EnvironmentConfig

_DEFAULT_MODEL = "runs/tiny-sft/model"
"""What an environment's file is trained from, where no --model is given."""


def rl_command(known: argparse.Namespace, rest: list[str]) -> int:
    """Train, with the values that the command line changes."""

    def of_model(model: str) -> RLRun:
        if not known.environment:
            raise ConfigError(f"{model} is a model; say what it learns, as in: --environment math")
        return in_environments(model, map(weighted, known.environment))

    def of_file(file: str) -> RLRun | None:
        if not has_environment(file) or has_recipe(file):
            return None
        model = value_of(rest, "--model") or _DEFAULT_MODEL
        check_model_directory(model)
        others = map(weighted, known.environment or ())
        return in_environments(model, [(file, 1.0), *others])

    def in_environments(model: str, named: Iterable[tuple[str, float]]) -> RLRun:
        environments = [
            EnvironmentConfig(name=name, weight=weight, difficulty=known.difficulty)
            for name, weight in named
        ]
        options = {} if known.steps is None else {"steps": known.steps}
        return own_environments(model, environments, lora=lora_of(rest), **options)

    own = {
        "--environment": known.environment,
        "--difficulty": known.difficulty,
        "--steps": known.steps,
    }
    run = chosen_run(known, rest, RLRun, of_model=of_model, of_model_only=own, of_file=of_file)
    if run is None:
        print(with_recipes(known.page(), RLRun))
    else:
        summary = watched(lambda callback: rl(run, runs=known.runs, callback=callback))
        print(result_text(summary, known.runs / run.name))
    return 0


def result_text(summary: RLSummary, folder: Path) -> str:
    """What a finished run has to show, for a terminal."""
    lines = [""]
    for sample in summary.samples:
        lines += [f"  {sample['environment']}: {line}" for line in sample["prompt"].splitlines()]
        lines += [*(f"  \u2502 {line}" for line in sample["text"].splitlines()), ""]
    lines += [
        *gain_lines(summary),
        *failure_lines(summary),
        "",
        f"{summary.parameters / 1e6:.1f}M parameters, {summary.seconds / 60:.1f} minutes",
        *ending(folder),
    ]
    return "\n".join(lines)


def gain_lines(summary: RLSummary) -> list[str]:
    """Rewards before and after training, by environment, as a table."""
    lines = [f"reward on {summary.held_out_tasks} held-out tasks of each environment"]
    lines.append(
        f"  {'environment':<24}{'before':>8}{'after':>8}  {'p (Holm)':<10}{'better':<16}"
        f"{'most common':>13}{'tokens':>10}"
    )
    for name, gain in summary.gains.items():
        before, after = summary.reward_before[name], summary.reward[name]
        common = f"{summary.most_common_before[name]:.0%} > {summary.most_common[name]:.0%}"
        tokens = f"{summary.tokens_before[name]:.0f} > {summary.tokens[name]:.0f}"
        lines.append(
            f"  {name:<24}{before:8.3f}{after:8.3f}  {gain.p_value:<10.2g}{gain.verdict:<16}"
            f"{common:>13}{tokens:>10}"
        )
    before, after = summary.reward_before["all"], summary.reward["all"]
    return [*lines, f"  {'mean':<24}{before:8.3f}{after:8.3f}"]


def failure_lines(summary: RLSummary) -> list[str]:
    """Rollouts that have no reward, by environment, each with a reason."""
    return [
        f"  {name}: {failed.held_out} held-out rollouts and {failed.training} of training failed; "
        f"one because: {failed.example or 'see rollouts.jsonl'}"
        for name, failed in summary.failures.items()
    ]
