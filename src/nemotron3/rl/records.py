"""Rollouts as they are kept on disk, for people to read and for comparisons."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron3.config import from_record
from nemotron3.environments.response import to_dict
from nemotron3.environments.rows import prompt_of, prompt_text
from nemotron3.errors import DataError
from nemotron3.rl.reward_shaping import (
    RewardShapingConfig,
    TurnPenalty,
    shaped_reward,
    turn_penalties,
    why_zeroed,
)
from nemotron3.rl.rollouts import Rollout, failure_of

BEFORE_TRAINING = "held-out tasks before training"
AFTER_TRAINING = "held-out tasks after training"


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """One rollout: what was asked, what the model did, and why it was rewarded."""

    when: str
    """A moment of the run, such as "step 10"."""
    environment: str
    group: int
    """Number of the task in its round; a refill of groups is another round."""
    prompt: str
    """The text of the prompt; by it a task is recognized before and after training."""
    messages: tuple[dict[str, Any], ...]
    """The prompt and what followed, in OpenAI's form."""
    reward: float | None
    components: dict[str, float]
    """The parts of the reward, by name."""
    failure: str | None
    """Why there is no reward."""
    answer: str
    """What the verifier read as the answer, or the content of the last turn."""
    labels: dict[str, str]
    """What is known of the task: `expected_answer`, and yes or no for each statement of the
    verifier, such as `is_answerable`."""
    shaped_reward: float | None = None
    """The reward that its advantage was computed from; None where something failed."""
    shaping: str | None = None
    """What shaping did to the reward, or that the rollout is left out of the loss; None where it
    did nothing."""
    advantage: float | None = None
    """What it was trained with; None where it was not."""
    penalties: tuple[TurnPenalty, ...] = ()
    """Turns that were trained with an advantage of their own instead."""
    tokens: int
    """Sampled ones."""
    is_cut: bool
    """Whether a limit of tokens or turns ended it."""

    @property
    def task(self) -> tuple[str, str]:
        """What makes it the same task in another evaluation: environment and prompt."""
        return self.environment, self.prompt

    @property
    def text(self) -> str:
        """What followed the prompt, for a terminal."""
        first = next(
            (i for i, m in enumerate(self.messages) if m["role"] == "assistant"),
            len(self.messages),
        )
        return "\n".join(line for message in self.messages[first:] for line in _lines(message))


def rollout_record(
    rollout: Rollout,
    *,
    when: str,
    advantage: float | None = None,
    shaping: RewardShapingConfig | None = None,
) -> RolloutRecord:
    """What is kept of a rollout; `shaping` is that of an update, and None for held-out tasks."""
    shaping = shaping or RewardShapingConfig()
    verification, failure = rollout.verification, failure_of(rollout)
    info: Mapping[str, Any] = {} if verification is None else verification.info
    answer = info.get("answer")
    return RolloutRecord(
        when=when,
        environment=rollout.environment,
        group=rollout.group,
        prompt=prompt_text(rollout.row),
        messages=tuple(to_dict(m) for m in (*prompt_of(rollout.row), *rollout.messages)),
        reward=rollout.reward,
        components={} if verification is None else dict(verification.components),
        failure=None if failure is None else failure.message,
        answer=rollout.response.answer if answer is None else str(answer),
        labels=_labels(rollout.row, info),
        shaped_reward=shaped_reward(rollout, shaping),
        shaping=_shaping(rollout, shaping),
        advantage=advantage,
        penalties=() if advantage is None else tuple(turn_penalties(rollout, shaping)),
        tokens=rollout.num_sampled,
        is_cut=rollout.is_cut,
    )


def read_records(file: Path, *, when: str) -> list[RolloutRecord]:
    """The records of one moment in a file of JSON lines.

    Raises `DataError` for a file of something else; a half-written last line is left out.
    """
    found: list[RolloutRecord] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                if record["when"] == when:
                    found.append(from_record(RolloutRecord, record))
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(
                    f"{file}, line {number} is no rollout of this version ({error!r}); delete the "
                    "run's folder, and repeat its command"
                ) from error
    return found


def means_by_environment(
    records: Sequence[RolloutRecord], value: Callable[[RolloutRecord], float | None]
) -> dict[str, float]:
    """By environment, and "all" for the mean of those; records without a value are left out."""
    values: dict[str, list[float]] = {}
    for record in records:
        if (found := value(record)) is not None:
            values.setdefault(record.environment, []).append(found)
    means = {name: sum(found) / len(found) for name, found in values.items()}
    return {"all": sum(means.values()) / max(len(means), 1)} | means


def _shaping(rollout: Rollout, config: RewardShapingConfig) -> str | None:
    """What shaping did to a rollout, in words."""
    reward, shaped = rollout.reward, shaped_reward(rollout, config)
    said: list[str] = []
    if (why := why_zeroed(rollout, config)) is not None and reward is not None:
        said.append(f"reward 0: {why}")
    elif reward != shaped:
        said.append(f"reward {shaped:.3g}: {rollout.effort} effort, {rollout.num_sampled} tokens")
    if config.filter_overlong and rollout.is_cut:
        said.append("left out of the loss: cut off")
    return "; ".join(said) or None


def _labels(row: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, str]:
    said = {name: "yes" if v else "no" for name, v in info.items() if isinstance(v, bool)}
    expected = row.get("expected_answer")
    return said | ({"expected_answer": expected} if isinstance(expected, str) else {})


def _lines(message: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if message.get("reasoning_content"):
        lines.append(f"({message['reasoning_content'].strip()})")
    for call in message.get("tool_calls", ()):
        function = call["function"]
        lines.append(f"[call] {function['name']}({json.dumps(function['arguments'])})")
    if message.get("content"):
        lines.append(f"[{message['role']}] {message['content']}")
    return lines
