"""The interface of an environment: tasks, tools, and a verifier that gives rewards.

    environment = load_environment("calculator", difficulty=0.3)
    for row in environment.tasks("train", seed=1): ...      # rows of NeMo Gym, without an end

    session = await environment.seed_session(row)           # the state of one rollout
    result = await environment.call_tool(session, name, arguments)
    said = await environment.step(session, turn)            # the user's next turn, or None: the end
    verification = await environment.verify(row, response, session)

An environment has no state of its own: what changes during a rollout is in its session, so any
number of rollouts run at once on one environment. Methods are asynchronous because judges and
sandboxes are elsewhere; those of the built-in environments return at once.

To write one, give `draw` (a task from a source of random numbers) and `verify`; `solve` adds
demonstrations, `run_tool` tools, and `step` conversations. The verbs are those of NeMo Gym's
resources servers.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from random import Random
from typing import Any

from nemotron3.environments.failures import failure_of_error
from nemotron3.environments.json_schema import schema_error
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.rows import Row, Split, make_row, prompt_text, split_of
from nemotron3.environments.verification import Verification
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import AssistantMessage, Message, Tool, ToolMessage, UserMessage

_MAX_DRAWS = 2000
"""Draws in search of one task of a split, before there seems to be none."""

ERROR = "error: "
"""How a tool's answer begins where the call was wrong."""


class Environment(ABC):
    """Tasks with rewards; see the module for how it is used.

    `difficulty` in [0, 1] says how hard the tasks are: 0 fits a model of a million parameters that
    reads 200 tokens, 1 is meant for real ones.
    """

    name: str
    """How people and rows call it; of the class, unless its tasks come from elsewhere."""
    tools: Sequence[Tool] = ()
    """What a policy may call."""
    compares_responses: bool = False
    """Whether the reward of a response depends on the others to its task (`verify_group`)."""
    max_turns: int = 1
    """Turns of the assistant after which a rollout is cut."""

    def __init__(self, *, difficulty: float = 0.5) -> None:
        if not getattr(type(self), "name", None):
            raise ConfigError(
                f"{type(self).__name__} has no name; give the class one: name = '...'"
            )
        if not (math.isfinite(difficulty) and 0 <= difficulty <= 1):
            raise ConfigError(f"difficulty is {difficulty}; give a number from 0 to 1")
        self.difficulty = float(difficulty)

    @abstractmethod
    def draw(self, random: Random) -> Row:
        """One task. The same random numbers give the same task; `row` makes it."""

    @abstractmethod
    async def verify(self, row: Row, response: TaskResponse, session: Any) -> Verification:
        """Judge a response. What failed without the policy's fault is a failure, never a 0.

        Raises `DataError` for a row that is none of this environment.
        """

    def solve(self, row: Row) -> list[AssistantMessage]:
        """The turns of a right solution, reasoning included, for demonstrations."""
        del row
        raise DataError(
            f"environment {self.name} has no demonstrations; give its class a method `solve`"
        )

    @property
    def has_demonstrations(self) -> bool:
        """Whether the class gives `solve`."""
        return type(self).solve is not Environment.solve

    async def seed_session(self, row: Row) -> Any:
        """The state that one rollout of a task begins with."""
        del row

    async def run_tool(self, session: Any, name: str, arguments: Mapping[str, Any]) -> str:
        """Run a tool whose arguments fit its schema; what it answers, for the model to read."""
        del session, arguments
        raise NotImplementedError(f"{type(self).__name__} offers {name} and has no run_tool")

    async def call_tool(self, session: Any, name: str, arguments: Mapping[str, Any]) -> str:
        """Answer a policy's call. A wrong one is told what is wrong with it (`error: ...`).

        Raises `RolloutFailedError` where the tool itself is out of order.
        """
        wrong = call_problem(self.tools, name, arguments)
        return f"{ERROR}{wrong}" if wrong else await self.run_tool(session, name, arguments)

    async def step(self, session: Any, turn: AssistantMessage) -> str | None:
        """What the user says after a turn that calls no tool; None where the rollout ends."""
        del session, turn
        return None

    async def verify_group(
        self, row: Row, responses: Sequence[TaskResponse], sessions: Sequence[Any]
    ) -> list[Verification]:
        """Judge the responses of one task together.

        Each is judged by itself unless this is overridden, and where one fails the others count.
        Rewards may compare the responses if the class says so in `compares_responses`.
        """

        async def judged(response: TaskResponse, session: Any) -> Verification:
            try:
                found: Any = await self.verify(row, response, session)
                if not isinstance(found, Verification):
                    raise TypeError(f"it returned {type(found).__name__}, not a Verification")
                return found
            except Exception as error:  # noqa: BLE001 - it may be anybody's code
                return Verification(failure=failure_of_error(error, self, "verify"))

        pairs = zip(responses, sessions, strict=True)
        return await asyncio.gather(*(judged(*pair) for pair in pairs))

    def row(
        self,
        prompt: str | Sequence[Message],
        /,
        *,
        tools: Sequence[Tool] | None = None,
        **fields: Any,
    ) -> Row:
        """A row of this environment, with its difficulty, and all of its tools unless given."""
        offered = self.tools if tools is None else tools
        return make_row(self.name, prompt, tools=offered, difficulty=self.difficulty, **fields)

    def task(self, index: int, *, split: str | Split = Split.TRAIN, seed: int = 0) -> Row:
        """Task number `index` of a split, a function of these three alone.

        Raises `DataError` where no draw is on that side: there are too few different prompts.
        """
        side = Split.named(split)
        random = Random(f"{self.name} {seed} {side} {index}")
        for _ in range(_MAX_DRAWS):
            row = self.draw(random)
            if split_of(row) is side:
                return row
        raise DataError(
            f"environment {self.name} at difficulty {self.difficulty}: none of {_MAX_DRAWS} tasks "
            f"is {side}; let `draw` make more different prompts"
        )

    def tasks(self, split: str | Split = Split.TRAIN, seed: int = 0) -> Iterator[Row]:
        """Tasks 0, 1, 2, ... of a split, without an end; prompts may repeat."""
        side = Split.named(split)
        return (self.task(index, split=side, seed=seed) for index in count())

    def distinct_tasks(
        self, num_tasks: int, *, split: str | Split = Split.HELD_OUT, seed: int = 0
    ) -> list[Row]:
        """The first tasks of a split whose prompts differ; held-out results need hundreds.

        Raises `DataError` where 20 times as many tasks have too few different prompts.
        """
        found: dict[str, Row] = {}
        for index in range(20 * num_tasks):
            if len(found) == num_tasks:
                break
            row = self.task(index, split=split, seed=seed)
            found.setdefault(prompt_text(row), row)
        if len(found) < num_tasks:
            raise DataError(
                f"environment {self.name} at difficulty {self.difficulty}: {20 * num_tasks} "
                f"{Split.named(split)} tasks have {len(found)} different prompts, {num_tasks} are "
                "wanted; ask for fewer, or let `draw` make more"
            )
        return list(found.values())

    async def play(self, row: Row, turns: Iterable[AssistantMessage]) -> tuple[TaskResponse, Any]:
        """Let given turns of an assistant play a task: the response, and the session it left."""
        session = await self.seed_session(row)
        messages: list[Message] = []
        is_complete = False
        for turn in turns:
            if is_complete:
                raise DataError(f"{self.name}: the task has ended before the last turn")
            messages.append(turn)
            for call in turn.tool_calls:
                answer = await self.call_tool(session, call.name, call.arguments)
                messages.append(ToolMessage(content=answer, tool_call_id=call.id))
            if not turn.tool_calls:
                said = await self.step(session, turn)
                is_complete = said is None
                messages += [] if said is None else [UserMessage(content=said)]
        return TaskResponse(messages=tuple(messages), is_complete=is_complete), session

    async def demonstration(self, row: Row) -> TaskResponse:
        """A right solution with the answers of tools and user, as supervised training wants it."""
        response, _ = await self.play(row, self.solve(row))
        return response


def call_problem(tools: Sequence[Tool], name: str, arguments: Mapping[str, Any]) -> str | None:
    """Why none of the tools takes a call; None where one does."""
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is None:
        return f"there is no tool {name[:40]}"
    return schema_error(dict(arguments), tool.parameters or {"type": "object"}, "the call")
