"""`nemotron3 rl`: reinforcement learning by a recipe, or of a model in named environments."""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from nemotron3.cli.overrides import override
from nemotron3.cli.progress import watch
from nemotron3.config import read_run
from nemotron3.errors import ConfigError
from nemotron3.models.huggingface.companions import CONFIG_FILE
from nemotron3.recipes.load import load_recipe
from nemotron3.recipes.own_environments import own_environments
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.run_rl import RLSummary, rl
from nemotron3.rl.sampling_plan import EnvironmentConfig


def rl_command(known: argparse.Namespace, rest: list[str]) -> int:
    """Train, with the values that the command line changes."""
    what = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if what is None and known.replay is None:
        if rest or known.environment:
            raise ConfigError(
                "no model; name it first, as in: nemotron3 rl runs/tiny-sft/model --environment "
                "math"
            )
        print(known.page())
        return 0
    run = _base_run(what, known)
    options = [*rest, "--help"] if known.help else rest
    run = override(run, options, prog=f"nemotron3 rl {what or '--from RUN.JSON'}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with watch() as callback:
        summary = rl(run, runs=known.runs, callback=callback)
    print(result_text(summary, known.runs / run.name))
    return 0


def _base_run(what: str | None, known: argparse.Namespace) -> RLRun:
    if known.replay is not None:
        if what is not None:
            raise ConfigError(f"give a recipe or model ({what!r}) or --from, not both")
        return read_run(known.replay, RLRun)
    assert what is not None
    if (Path(what) / CONFIG_FILE).is_file():
        if not known.environment:
            raise ConfigError(f"{what} is a model; say what it learns, as in: --environment math")
        environments = [
            replace(_environment(text), difficulty=known.difficulty) for text in known.environment
        ]
        return own_environments(what, environments, steps=known.steps)
    if known.environment:
        raise ConfigError("--environment goes with a model directory; a recipe names its own")
    if Path(what).is_dir():
        raise ConfigError(
            f"{what} holds no {CONFIG_FILE}; give a model directory, such as {what}/model"
        )
    return load_recipe(what, RLRun)


def _environment(text: str) -> EnvironmentConfig:
    """NAME or NAME=WEIGHT."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return EnvironmentConfig(name=text)
    try:
        return EnvironmentConfig(name=name, weight=float(weight))
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--environment {text}: {weight!r} is no weight; write NAME=WEIGHT, as in math=2"
        ) from error


def result_text(summary: RLSummary, folder: Path) -> str:
    """What a finished run has to show, for a terminal."""
    lines = ["", f"reward on {summary.held_out_tasks} held-out tasks of each environment"]
    lines.append(f"  {'environment':<24}{'before':>8}{'after':>8}{'tokens':>10}")
    for name, after in summary.reward.items():
        before = summary.reward_before[name]
        tokens = f"{summary.tokens_before[name]:.0f} > {summary.tokens[name]:.0f}"
        lines.append(f"  {name:<24}{before:8.3f}{after:8.3f}{tokens:>10}")
    lines += [
        "",
        f"{summary.parameters / 1e6:.1f}M parameters, {summary.seconds / 60:.1f} minutes",
        f"  model    {folder / 'model'}",
        f"  report   {folder / 'report.html'}",
        "",
        f"try: nemotron3 chat {folder / 'model'}",
    ]
    return "\n".join(lines)
