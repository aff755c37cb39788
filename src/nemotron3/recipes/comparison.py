"""Runs and evaluations side by side: their results, and tests where they did the same tasks."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from nemotron3.config import RUN_FILE, read_record, to_record
from nemotron3.errors import ConfigError, DataError
from nemotron3.evaluation.results import Evaluation, read_evaluation
from nemotron3.evaluation.statistics import Finding, judge
from nemotron3.models.huggingface.companions import CONFIG_FILE
from nemotron3.observe.plots import Series
from nemotron3.observe.report import load_series
from nemotron3.recipes.run_folder import METRICS_FILE, ROLLOUTS_FILE, SUMMARY_FILE
from nemotron3.rl.records import AFTER_TRAINING, RolloutRecord, read_records

Rewards = Mapping[str, Mapping[str, float]]
"""By what was asked (an environment, a task of the harness), the reward of each question."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One run or evaluation."""

    name: str
    path: Path
    kind: str
    """pretrain, sft, rl or evaluation."""
    results: Mapping[str, float]
    """Key results by name."""
    rewards: Rewards = field(default_factory=dict[str, dict[str, float]])
    metrics: Mapping[str, Series] = field(default_factory=dict[str, Series])
    """Curves of training by name."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What rewards depend on beside the model and the task."""


@dataclass(frozen=True, kw_only=True)
class Tested:
    """Rewards of the same tasks, compared with those of the first."""

    first: str
    second: str
    what: str
    """The environment, or the task and metric."""
    finding: Finding


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Several runs and evaluations, the first of which the others are compared with."""

    compared: tuple[Compared, ...]
    tested: tuple[Tested, ...]
    notes: tuple[str, ...]
    """What a reader should know of the tests, or why there are none."""

    @property
    def results(self) -> dict[str, list[float | None]]:
        """Every result by name; None where one has it not."""
        names = dict.fromkeys(name for each in self.compared for name in each.results)
        return {name: [each.results.get(name) for each in self.compared] for name in names}

    @property
    def common_metrics(self) -> list[str]:
        """Metrics that two or more have, in the order of the first."""
        counts = Counter(name for each in self.compared for name in each.metrics)
        return [name for name, count in counts.items() if count > 1]


def compare(paths: Sequence[Path], *, smallest_effect: float, alpha: float) -> Comparison:
    """Read runs and evaluations, and test each against the first where both did the same tasks.

    Raises `ConfigError` or `DataError` for a path that is neither, and for those that have nothing
    in common.
    """
    if len(paths) < 2:
        raise ConfigError("one run is no comparison; name two or more")
    compared = _with_different_names([read_compared(path) for path in paths])
    first, *others = compared
    pairs: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    notes: list[str] = []
    for other in others:
        shared = [what for what in first.rewards if what in other.rewards]
        for what in shared:
            one, two = first.rewards[what], other.rewards[what]
            both = [task for task in one if task in two]
            if both:
                pairs[other.name, what] = [one[t] for t in both], [two[t] for t in both]
            if len(both) < max(len(one), len(two)):
                notes.append(
                    f"{what}: {len(both)} of {len(one)} tasks of {first.name} are among the "
                    f"{len(two)} of {other.name}"
                )
        notes += _differing_settings(first, other) if shared else []
    findings = judge(
        {" / ".join(key): pair for key, pair in pairs.items()},
        smallest_effect=smallest_effect,
        alpha=alpha,
    )
    tested = tuple(
        Tested(first=first.name, second=second, what=what, finding=findings[f"{second} / {what}"])
        for second, what in pairs
    )
    found = Comparison(compared=tuple(compared), tested=tested, notes=tuple(notes))
    in_common = any(
        sum(value is not None for value in values) > 1 for values in found.results.values()
    )
    if not (in_common or found.common_metrics or tested):
        listed = "; ".join(
            f"{each.name} ({each.kind}) has {', '.join([*each.results][:4]) or 'no results'}"
            for each in compared
        )
        raise ConfigError(f"there is nothing in common to compare: {listed}")
    return found


def read_compared(path: Path) -> Compared:
    """A run by its folder, or an evaluation by its file; raises `DataError` for anything else."""
    if path.is_file():
        return _evaluation(path, read_evaluation(path))
    if not path.exists():
        raise DataError(f"{path} does not exist; name a run's folder, or a file that eval wrote")
    if not (path / RUN_FILE).is_file():
        hint = "name a run's folder, such as runs/tiny, or a file that eval wrote"
        if (path / CONFIG_FILE).is_file():
            hint = (
                f"it is a model; name its run, or evaluate it: nemotron3 eval {path} "
                "--environment NAME --json OUT.json"
            )
        raise DataError(f"{path} is no run, for it holds no {RUN_FILE}; {hint}")
    return _run(path)


def _evaluation(path: Path, found: Evaluation) -> Compared:
    results: dict[str, float] = {}
    for name, result in found.environments.items():
        if result.reward is not None:
            results[f"reward, {name}"] = result.reward.mean
            results[f"tokens, {name}"] = result.tokens
            results[f"most common answer, {name}"] = result.top_answer_share
    rewards = dict(_rewards(found.tasks))
    for text, result in found.texts.items():
        results[f"bits per byte, {text}"] = result.bits_per_byte
        # More must be better, as for rewards.
        saved = {document: -bits for document, bits in result.by_document.items()}
        rewards[f"bits per byte saved, {text}"] = saved
    for task, result in found.harness.items():
        results |= {f"{task} {metric}": value for metric, value in result.metrics.items()}
        rewards |= {f"{task} {metric}": values for metric, values in result.samples.items()}
    settings = to_record(found.settings)
    settings |= {f"rollouts.{name}": value for name, value in settings.pop("rollouts").items()}
    return Compared(
        name=path.stem,
        path=path,
        kind="evaluation",
        results=results,
        rewards=rewards,
        settings={n: v for n, v in settings.items() if n not in ("num_tasks", "seed")},
    )


def _run(path: Path) -> Compared:
    kind = str(read_record(path)["config"].get("kind"))
    summary_file = path / SUMMARY_FILE
    is_finished = summary_file.is_file()
    try:
        metrics = load_series(path / METRICS_FILE)
        if is_finished:
            results = _RESULTS[kind](json.loads(summary_file.read_text("utf-8")))
        else:
            results = {
                f"{name}, step {int(one.steps[-1])}": float(one.values[-1])
                for name, one in metrics.items()
                if name == "train/loss" or name.startswith("eval/")
            }
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as a finished run of kind {kind} ({error!r}); repeat it"
        ) from error
    if not (results or metrics):
        raise DataError(f"{path} has no results yet: neither a finished step nor a summary")
    rollouts, played = path / ROLLOUTS_FILE, list[RolloutRecord]()
    if is_finished and rollouts.is_file():
        played = read_records(rollouts, when=AFTER_TRAINING)
    return Compared(
        name=path.resolve().name,
        path=path,
        kind=kind,
        results=results,
        rewards=_rewards(played),
        metrics=metrics,
    )


def _pretrained(summary: Mapping[str, Any]) -> dict[str, float]:
    by_source = {f"bits per byte, {name}": bits for name, bits in summary["by_source"].items()}
    return {"bits per byte": summary["bits_per_byte"]} | by_source | _costs(summary)


def _tuned(summary: Mapping[str, Any]) -> dict[str, float]:
    losses = {f"held-out loss, {name}": loss for name, loss in summary["loss"].items()}
    return losses | {"held-out accuracy": summary["accuracy"]} | _costs(summary)


def _reinforced(summary: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, reward in summary["reward"].items():
        found[f"reward, {name}"] = reward
        found[f"tokens, {name}"] = summary["tokens"][name]
        if name in summary["most_common"]:
            found[f"most common answer, {name}"] = summary["most_common"][name]
    return found | _costs(summary)


def _costs(summary: Mapping[str, Any]) -> dict[str, float]:
    return {"minutes": summary["seconds"] / 60, "parameters": summary["parameters"]}


_RESULTS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "pretrain": _pretrained,
    "sft": _tuned,
    "rl": _reinforced,
}


def _rewards(tasks: Sequence[RolloutRecord]) -> dict[str, dict[str, float]]:
    """By environment and prompt; a prompt that was played more than once has its mean."""
    played: dict[str, dict[str, list[float]]] = {}
    for task in tasks:
        if task.reward is not None:
            played.setdefault(task.environment, {}).setdefault(task.prompt, []).append(task.reward)
    return {
        name: {prompt: sum(rewards) / len(rewards) for prompt, rewards in own.items()}
        for name, own in played.items()
    }


def _differing_settings(first: Compared, other: Compared) -> list[str]:
    if not (first.settings and other.settings):
        return []
    return [
        f"{first.name} and {other.name} were measured with another {name}: "
        f"{first.settings[name]} and {other.settings[name]}"
        for name in first.settings
        if first.settings[name] != other.settings.get(name)
    ]


def _with_different_names(compared: Sequence[Compared]) -> list[Compared]:
    """Those that share a name are called by their paths; the same path twice is an error."""
    counts = Counter(each.name for each in compared)
    named = [
        each if counts[each.name] == 1 else replace(each, name=str(each.path)) for each in compared
    ]
    for (i, one), (j, other) in product(enumerate(named), repeat=2):
        if i < j and one.name == other.name:
            raise ConfigError(f"{one.name} is named twice; a comparison with itself says nothing")
    return named
