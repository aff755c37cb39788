"""Solved tasks of environments as conversations for supervised fine-tuning."""

import asyncio
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from nemotron3.data.conversations import Conversation
from nemotron3.environments.environment import Environment
from nemotron3.environments.registry import environment_files, load_environment
from nemotron3.environments.rows import Row, prompt_of, tools_of
from nemotron3.errors import ConfigError
from nemotron3.text.messages import AssistantMessage, Message, SystemMessage


@dataclass(frozen=True, kw_only=True)
class DemonstrationsConfig:
    """A fixed set of solved training tasks of one environment."""

    environment: str
    """A built-in one, or a Python file with one."""
    num_tasks: int
    """How many; tasks 0, 1, 2, ... of the seed."""
    difficulty: float | None = None
    """From 0 to 1; null for the environment's own."""
    seed: int = 0
    """Of the tasks; reinforcement learning with another seed has others."""
    weight: float = 1.0
    """How often an epoch has each of them."""

    def __post_init__(self) -> None:
        if self.num_tasks < 2:
            raise ConfigError(
                f"is {self.num_tasks}; it must be 2 or more, since one task is held out",
                field="demonstrations.num_tasks",
            )
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"is {self.weight}; it must be above 0, and finite", field="demonstrations.weight"
            )

    @property
    def title(self) -> str:
        """The source's name."""
        return Path(self.environment).stem

    @property
    def files(self) -> list[Path]:
        """What the demonstrations depend on besides the package: a user's own file."""
        return environment_files(self.environment)


def demonstrations(config: DemonstrationsConfig) -> list[Conversation]:
    """Solve the tasks. Raises DataError for an environment without demonstrations."""
    environment = load_environment(config.environment, difficulty=config.difficulty)
    rows = islice(environment.tasks("train", config.seed), config.num_tasks)
    return asyncio.run(_solved(environment, list(rows)))


def with_earlier_tasks(
    sources: Mapping[str, Sequence[Conversation]],
    fraction: float,
    *,
    seed: int,
    fits: Callable[[Conversation], bool],
) -> dict[str, Sequence[Conversation]]:
    """Conversations whose last question is a task, of which a random share begins with others.

    So that a model answers a second question as it answers a first one, a `fraction` of the tasks
    of every source follows one or two solved tasks of any source, where all of it `fits`. Their
    answers are context, whose reasoning the chat template leaves out; the last one is trained.
    """
    every = [row for rows in sources.values() for row in rows if not _has_system_message(row)]
    chance = random.Random(f"earlier tasks {seed}")

    def after_others(row: Conversation) -> Conversation:
        if chance.random() >= fraction or _has_system_message(row):
            return row
        before = [chance.choice(every) for _ in range(chance.randint(1, 2))]
        tools = {tool.name: tool for each in (*before, row) for tool in each.tools}
        context = (_as_context(message) for each in before for message in each.messages)
        longer = replace(row, messages=(*context, *row.messages), tools=tuple(tools.values()))
        return longer if fits(longer) else row

    return {name: [after_others(row) for row in rows] for name, rows in sources.items()}


def _as_context(message: Message) -> Message:
    if isinstance(message, AssistantMessage):
        return replace(message, is_trained=False)
    return message


def _has_system_message(row: Conversation) -> bool:
    return any(isinstance(message, SystemMessage) for message in row.messages)


async def _solved(environment: Environment, rows: list[Row]) -> list[Conversation]:
    responses = [await environment.demonstration(row) for row in rows]
    return [
        Conversation(
            messages=(*prompt_of(row), *response.messages),
            tools=tools_of(row),
            place=f"demonstration {index} of {environment.name}",
        )
        for index, (row, response) in enumerate(zip(rows, responses, strict=True))
    ]
