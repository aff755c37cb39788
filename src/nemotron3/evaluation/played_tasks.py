"""Tasks that a policy has played, as they are kept: what it did, the reward, and why."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron3.config import from_record
from nemotron3.environments.rows import prompt_text
from nemotron3.errors import DataError
from nemotron3.rl.rollouts import Rollout, failure_of
from nemotron3.text import AssistantMessage


@dataclass(frozen=True, kw_only=True)
class PlayedTask:
    """A rollout as it is kept."""

    environment: str
    prompt: str
    text: str
    """What followed the prompt, for a person to read."""
    reward: float | None
    failure: str | None
    """Why there is no reward."""
    tokens: int
    """Sampled ones."""
    is_cut: bool
    answer: str
    """What the verifier read as the answer, or the content of the last turn."""
    labels: dict[str, str]
    """What is known of the task: `expected_answer`, and yes or no for each statement of the
    verifier, such as `is_answerable`."""

    @property
    def task(self) -> tuple[str, str]:
        """What makes it the same task in another evaluation: environment and prompt."""
        return self.environment, self.prompt


def played_task(rollout: Rollout) -> PlayedTask:
    """What a rollout came to."""
    info = {} if rollout.verification is None else rollout.verification.info
    answer = info.get("answer")
    return PlayedTask(
        environment=rollout.environment,
        prompt=prompt_text(rollout.row),
        text=as_text(rollout),
        reward=rollout.reward,
        failure=None if (failure := failure_of(rollout)) is None else failure.message,
        tokens=rollout.num_sampled,
        is_cut=rollout.is_cut,
        answer=rollout.response.answer if answer is None else str(answer),
        labels=_labels(rollout.row, info),
    )


def read_played(file: Path) -> list[PlayedTask]:
    """The tasks of a file that `write_json` wrote; raises `DataError` for another one."""
    try:
        records = json.loads(file.read_text("utf-8"))
        return [from_record(PlayedTask, record) for record in records]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{file} holds no played tasks of this version ({error}); delete it, and repeat what "
            "wrote it"
        ) from error


def means_by_environment(
    played: Sequence[PlayedTask], value: Callable[[PlayedTask], float | None]
) -> dict[str, float]:
    """By environment, and "all" for the mean of those; tasks whose value is None are left out."""
    values: dict[str, list[float]] = {}
    for task in played:
        if (found := value(task)) is not None:
            values.setdefault(task.environment, []).append(found)
    means = {name: sum(found) / len(found) for name, found in values.items()}
    return {"all": sum(means.values()) / max(len(means), 1)} | means


def as_text(rollout: Rollout) -> str:
    """The messages of a rollout for a person to read."""
    lines: list[str] = []
    for message in rollout.messages:
        if isinstance(message, AssistantMessage):
            if message.reasoning:
                lines.append(f"({message.reasoning.strip()})")
            for call in message.tool_calls:
                lines.append(f"[call] {call.name}({json.dumps(dict(call.arguments))})")
        if message.content:
            role = type(message).__name__.removesuffix("Message").lower()
            lines.append(f"[{role}] {message.content}")
    return "\n".join(lines)


def _labels(row: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, str]:
    labels = {
        name: "yes" if value else "no" for name, value in info.items() if isinstance(value, bool)
    }
    expected = row.get("expected_answer")
    return labels | ({"expected_answer": expected} if isinstance(expected, str) else {})
