"""`nemotron3 eval`: what a model reaches, as a table, and as a record of every task."""

import argparse
from pathlib import Path

import torch

from nemotron3.cli.progress import watch
from nemotron3.cli.tuning import with_number
from nemotron3.config import write_json
from nemotron3.data import FilesConfig
from nemotron3.environments.registry import BUILT_IN, load_environment
from nemotron3.errors import ConfigError
from nemotron3.evaluation.environments import (
    HELD_OUT_SEED,
    EnvironmentResult,
    MeanReward,
    environments_by_name,
)
from nemotron3.evaluation.results import Evaluation, EvaluationSettings
from nemotron3.models.huggingface import read_config
from nemotron3.recipes.evaluate import EvaluationPlan, HarnessTasks, evaluate_directory
from nemotron3.rl.rollouts import RolloutConfig

_MAX_CONTEXT = 1024


def eval_command(known: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    out: Path | None = known.json
    if out is not None and out.is_dir():
        raise ConfigError(f"{out} is a folder; give the name of a file", field="--json")
    plan = _plan(known)
    with watch() as callback:
        found = evaluate_directory(known.path, plan, callback=callback)
    if out is not None:
        write_json(out, found)
    print(evaluation_text(found))
    if out is not None:
        print(f"\nwritten to {out}; nemotron3 compare {out} OTHER.json puts two side by side")
    return 0


def _plan(known: argparse.Namespace) -> EvaluationPlan:
    for name in ("num_tasks", "seq_len", "limit"):
        value = getattr(known, name)
        if value is not None and value < 1:
            raise ConfigError(f"is {value}; it must be 1 or more", field=name)
    if known.budget is not None and known.budget < 0:
        raise ConfigError(f"is {known.budget}; it must be 0 or more", field="budget")
    _refuse_what_does_nothing(known)
    named = [with_number(text) for text in _all_named(known.environment or ())]
    environments = environments_by_name(
        load_environment(name, difficulty=known.difficulty if own is None else own)
        for name, own in named
    )
    settings = EvaluationSettings(
        seed=HELD_OUT_SEED if known.seed is None else known.seed,
        num_tasks=known.num_tasks,
        rollouts=_rollouts(known),
        difficulties={name: each.difficulty for name, each in environments.items()},
        seq_len=known.seq_len,
        dtype=known.dtype,
    )
    return EvaluationPlan(
        settings=settings,
        environments=environments,
        texts=tuple(FilesConfig(path=path, column=known.column) for path in known.data or ()),
        harness=None
        if known.tasks is None
        else HarnessTasks(
            names=tuple(known.tasks),
            include_path=known.include_path,
            num_fewshot=known.num_fewshot,
            limit=known.limit,
        ),
        device=known.device,
        dtype=None if known.dtype == "auto" else getattr(torch, known.dtype),
        chat_style=known.chat_style,
        max_num_seqs=known.max_num_seqs,
        lora=known.lora,
    )


def _rollouts(known: argparse.Namespace) -> RolloutConfig:
    try:
        return RolloutConfig(
            max_tokens=known.max_tokens,
            max_context=_max_context(known),
            temperature=known.temperature,
            enable_thinking=not known.no_think,
            reasoning_budget=known.budget,
        )
    except ConfigError as error:
        names = ("max_tokens", "max_context", "temperature")
        raise error.renamed({f"rollouts.{name}": name for name in names}) from error


def _refuse_what_does_nothing(known: argparse.Namespace) -> None:
    goes_with = {
        "--environment": ("difficulty", "max_context", "budget", "chat_style"),
        "--tasks": ("include_path", "num_fewshot", "limit"),
    }
    for option, names in goes_with.items():
        if getattr(known, option.removeprefix("--")):
            continue
        for name in names:
            if getattr(known, name) is not None:
                raise ConfigError(f"goes with {option}, which is not given", field=name)


def _all_named(given: "list[str] | tuple[str, ...]") -> list[str]:
    """The environments named, with all built-in ones for `all`."""
    names: list[str] = []
    for text in given:
        name, difficulty = with_number(text)
        own = "" if difficulty is None else f"={difficulty}"
        names += [each + own for each in BUILT_IN] if name == "all" else [text]
    return names


def _max_context(known: argparse.Namespace) -> int:
    if known.max_context is not None or not (known.path / "config.json").is_file():
        return known.max_context or _MAX_CONTEXT
    return min(_MAX_CONTEXT, read_config(known.path).max_position_embeddings)


def evaluation_text(found: Evaluation) -> str:
    """The results, for a terminal."""
    lines: list[str] = []
    if found.environments:
        lines += _environment_lines(found)
    if found.texts:
        lines += ["", f"{'text':<40}{'bits/byte':>11}{'loss':>8}{'bytes':>13}{'documents':>11}"]
        for path, text in found.texts.items():
            lines.append(
                f"{path[-38:]:<40}{text.bits_per_byte:>11.4f}{text.loss:>8.3f}"
                f"{text.num_bytes:>13,}{text.num_documents:>11,}"
            )
            lines += [f"  left out: {text.bad_rows}"] if text.bad_rows else []
    if found.harness:
        lines += ["", "tasks of lm-evaluation-harness"]
    for task, result in found.harness.items():
        for metric, value in result.metrics.items():
            counted = len(result.samples.get(metric, ()))
            questions = f"  {counted} questions" if counted else ""
            lines.append(f"  {task:<28}{metric:<28}{value:>10.4f}{questions}")
    return "\n".join(lines)


def _environment_lines(found: Evaluation) -> list[str]:
    settings = found.settings
    how = f"sampled at temperature {settings.rollouts.temperature:g}"
    if settings.rollouts.temperature == 0:
        how = "the most probable tokens"
    lines = [
        "",
        f"{found.name}: {settings.num_tasks} different held-out tasks of each environment, {how}, "
        f"seed {settings.seed}",
        f"{'environment':<24}{'reward':>8}  {'95% interval':<16}{'=1':>6}{'tokens':>8}{'cut':>6}"
        f"{'failed':>8}  most common answer",
    ]
    for name, result in found.environments.items():
        lines.append(_environment_line(name, result))
        for label, groups in result.by_label.items():
            lines += [_label_line(label, value, mean) for value, mean in groups.items()]
    rewards = [result.reward for result in found.environments.values()]
    means = [reward.mean for reward in rewards if reward is not None]
    if len(means) == len(rewards) > 1:
        lines.append(f"{'mean of environments':<24}{sum(means) / len(means):>8.3f}")
    return lines


def _environment_line(name: str, result: EnvironmentResult) -> str:
    answer = f"{result.top_answer[:24]!r} {result.top_answer_share:.0%}"
    if result.top_answer_is_right is not None:
        answer += f" (right for {result.top_answer_is_right:.0%})"
    return (
        f"{name:<24}{_reward(result.reward)}{result.share_perfect:>6.0%}{result.tokens:>8.1f}"
        f"{result.share_cut:>6.0%}{result.num_failures:>8}  {answer}"
    )


def _label_line(label: str, value: str, mean: MeanReward) -> str:
    return f"  {f'{label} = {value}'[:22]:<22}{_reward(mean)}{mean.n:>6} tasks"


def _reward(mean: MeanReward | None) -> str:
    if mean is None:
        return f"{'none':>8}  {'':<16}"
    interval = f"[{mean.interval.low:.3f}, {mean.interval.high:.3f}]"
    return f"{mean.mean:>8.3f}  {interval:<16}"
