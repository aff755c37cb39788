"""The record of an evaluation: what was measured, how, and every task's reward.

    write_json(path, evaluation)
    evaluation = read_evaluation(path)

Two records are compared task by task, so each keeps what was asked, what was answered and the
reward, beside the settings that the answers depend on.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from nemotron3.config import from_record
from nemotron3.errors import ConfigError, DataError
from nemotron3.evaluation.environments import EnvironmentResult
from nemotron3.evaluation.text import TextResult
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import RolloutConfig


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What a model reached on one task of lm-evaluation-harness."""

    metrics: dict[str, float]
    """Its aggregated metrics, such as "acc,none"."""
    samples: dict[str, dict[str, float]]
    """The value of each question by its hash, for the metrics of which more is better."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What the results depend on beside the model."""

    seed: int
    """Of the held-out tasks and of the sampling."""
    num_tasks: int
    """Different held-out tasks of each environment."""
    rollouts: RolloutConfig
    difficulties: dict[str, float] = field(default_factory=dict[str, float])
    """Of the environments, by name."""
    seq_len: int = 1024
    """Tokens of a window of held-out text."""
    dtype: str = "float32"
    """What the weights were held in."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was measured of one model."""

    kind: Literal["evaluation"] = "evaluation"
    name: str
    """The model's: of its run, or of its directory."""
    model: str
    """Its directory."""
    command: str
    """The line that measures this again."""
    device: str
    settings: EvaluationSettings
    environments: dict[str, EnvironmentResult] = field(default_factory=dict[str, EnvironmentResult])
    texts: dict[str, TextResult] = field(default_factory=dict[str, TextResult])
    """By path."""
    harness: dict[str, HarnessResult] = field(default_factory=dict[str, HarnessResult])
    """By task."""
    tasks: tuple[RolloutRecord, ...] = ()
    """Every rollout in the environments."""


def read_evaluation(file: Path) -> Evaluation:
    """Read a record; raises `DataError` for a file that is none."""
    try:
        record: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON ({error})") from error
    kind = cast(dict[str, Any], record).get("kind") if isinstance(record, dict) else None
    if kind != "evaluation":
        raise DataError(
            f"{file} is no evaluation; write one with: nemotron3 eval MODEL ... --json {file.name}"
        )
    try:
        return from_record(Evaluation, record)
    except ConfigError as error:
        raise DataError(
            f"{file} is an evaluation of another version ({error}); evaluate the model again"
        ) from error
