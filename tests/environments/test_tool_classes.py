"""TRL's style both ways: its classes as environments of ours, and ours as its classes."""

import asyncio
import json
import random
from pathlib import Path
from typing import Literal

import pytest
from transformers.utils import get_json_schema

from nemotron3.environments import (
    BUILT_IN,
    Environment,
    FailureKind,
    RolloutFailedError,
    TaskResponse,
    ToolClassEnvironment,
    load_environment,
    prompt_text,
    tools_of,
)
from nemotron3.environments.tool_classes import tool_of_function
from nemotron3.environments.trl import for_trl
from nemotron3.errors import ConfigError, DataError


class Counter:
    """A class in TRL's style."""

    def reset(self, *, start: int = 0, **columns) -> str | None:
        self._wanted, self.count = columns["wanted"], start
        return f" It is {start}." if start else None

    def add(self, number: int, times: int = 1) -> str:
        """
        Add a number.

        Args:
            number: What to add,
                whole.
            times (int): How often.

        Returns:
            The sum.
        """
        if number < 0:
            raise ValueError("only upward")
        self.count += number * times
        return str(self.count)

    async def get(self) -> int:
        """Read the counter."""
        return self.count

    def get_reward(self) -> float:
        return float(self.count == self._wanted)

    def _hidden(self):
        raise AssertionError


class CounterEnvironment(ToolClassEnvironment):
    name = "count"
    factory = Counter
    dataset = tuple(
        {"prompt": f"Count to {wanted}.", "wanted": wanted, "start": wanted % 3}
        for wanted in range(40)
    )


def played(environment, row, calls, answer="done"):
    async def play():
        session = await environment.seed_session(row)
        said = [await environment.call_tool(session, *call) for call in calls]
        response = TaskResponse.of({"role": "assistant", "content": answer})
        return said, await environment.verify(row, response, session)

    return asyncio.run(play())


def test_a_class_of_trl_is_an_environment():
    environment = CounterEnvironment()
    assert [tool.name for tool in environment.tools] == ["add", "get"]
    assert environment.tools[0].description == "Add a number."
    assert environment.tools[0].parameters == {
        "type": "object",
        "properties": {
            "number": {"type": "integer", "description": "What to add, whole."},
            "times": {"type": "integer", "description": "How often."},
        },
        "required": ["number"],
    }
    row = next(row for row in environment.tasks() if row["columns"]["start"] == 2)
    wanted = row["columns"]["wanted"]
    assert prompt_text(row) == f"Count to {wanted}. It is 2."
    calls = [("add", {"number": -1}), ("add", {"number": 1, "times": wanted - 2}), ("get", {})]
    said, verification = played(environment, row, calls)
    assert said == ["error: only upward", str(wanted), str(wanted)]
    assert verification.reward == 1.0
    assert played(environment, row, [])[1].reward == 0.0
    wrong = [("add", {"number": "1"}), ("_hidden", {}), ("get_reward", {}), ("reset", {})]
    assert all(text.startswith("error: ") for text in played(environment, row, wrong)[0])
    assert {prompt_text(row) for row in environment.distinct_tasks(2)}
    json.dumps(row)


def test_a_reward_function_is_given_what_trl_gives():
    given = []

    def reward(prompts, completions, environments, wanted, **columns):
        given.append((prompts, completions, environments[0].count, wanted, columns))
        return [None if completions[0][-1]["content"] == "?" else 0.25]

    class Judged(CounterEnvironment):
        name = "judged"
        reward_function = staticmethod(reward)

    environment = Judged()
    row = environment.task(0)
    assert played(environment, row, [])[1].reward == 0.25
    prompts, completions, count, wanted, columns = given[0]
    assert prompts[0][0]["role"] == "user"
    assert completions == [[{"role": "assistant", "content": "done"}]]
    assert (count, wanted) == (row["columns"]["start"], [row["columns"]["wanted"]])
    assert columns == {"start": [count]}
    assert played(environment, row, [], "?")[1].failure.kind == FailureKind.JUDGE


def test_a_file_with_such_a_class_is_found(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from nemotron3.environments import ToolClassEnvironment\n"
        "from tests.environments.test_tool_classes import Counter\n"
        "class Mine(ToolClassEnvironment):\n"
        "    name, factory = 'mine', Counter\n"
        "    dataset = [{'prompt': 'Count.', 'wanted': 1}]\n",
        encoding="utf-8",
    )
    assert load_environment(str(file)).name == "mine"
    with pytest.raises(ConfigError, match=r"as difficult as they are.*leave difficulty out"):
        load_environment(str(file), difficulty=0.5)


def test_the_class_of_the_documentation_is_one(tmp_path):
    pages = Path(__file__).parents[2] / "docs" / "environments.md"
    section = pages.read_text("utf-8").partition("## TRL")[2]
    file = tmp_path / "counter.py"
    file.write_text(section.partition("```python\n")[2].partition("```")[0], encoding="utf-8")
    environment = load_environment(str(file))
    row = environment.task(0)
    said, verification = played(environment, row, [("add", {"number": row["columns"]["wanted"]})])
    assert (said, verification.reward) == ([str(row["columns"]["wanted"])], 1.0)


def bad(**changes):
    return type(
        "Bad", (ToolClassEnvironment,), {"name": "bad", "dataset": [{"prompt": "x"}], **changes}
    )


class Bare:
    def __init__(self):
        self.calls = 0

    def reset(self, **_):
        self.calls += 1

    def get_reward(self):
        return 0.0


class NoReward:
    def reset(self, **_):
        pass


class NoReset:
    def get_reward(self):
        return 0.0


class Untyped(Bare):
    def tool(self, x):
        """Do."""


class Undocumented(Bare):
    def tool(self, x: int):
        pass


class Open(Bare):
    def tool(self, **x: int):
        """Do."""


class Odd(Bare):
    def tool(self, x: complex):
        """Do."""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factory": Bare, "dataset": None}, "Bad has no `dataset`; give the class one"),
        ({}, "Bad has no `factory`; give the class one"),
        ({"factory": Bare()}, "without calling it"),
        ({"factory": Bare, "dataset": []}, "`dataset` has no rows"),
        ({"factory": Bare, "dataset": iter([{"prompt": "x"}])}, "is a list_iterator; give a list"),
        ({"factory": Bare, "dataset": ["x"]}, "first row of `dataset` is 'x'; give each a"),
        ({"factory": Bare, "dataset": [{"question": "x"}]}, "give each a `prompt`"),
    ],
)
def test_what_is_missing_is_named(changes, said):
    with pytest.raises(ConfigError, match=said):
        bad(**changes)()


def test_neither_dataset_nor_factory_is_an_error_of_the_class():
    with pytest.raises(ConfigError, match="Empty has no `factory`"):
        type("Empty", (ToolClassEnvironment,), {"name": "empty"})()
    with pytest.raises(ConfigError, match="Empty has no `dataset`"):
        type("Empty", (ToolClassEnvironment,), {"name": "empty", "factory": Bare})()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoReset, "has no method `reset`"), (NoReward, "has no method `get_reward`"),
        (Untyped, "x has no type hint"), (Undocumented, "has no docstring"),
        (Open, "takes any arguments"), (Odd, "of type <class 'complex'>; tools take"),
    ],
)  # fmt: skip
def test_classes_that_say_too_little_are_refused(kind, said):
    with pytest.raises(ConfigError, match=said):
        bad(factory=kind)()


def test_rows_that_cannot_be_played_are_refused():
    with pytest.raises(ConfigError, match="has no rows"):
        bad(factory=Bare, dataset=[])()

    class Random(Bare):
        made = 0

        def reset(self, **_):
            Random.made += 1
            return str(Random.made)

    environment = bad(factory=Random)()
    row = environment.draw(random.Random(0))
    with pytest.raises(DataError, match="follow from the columns"):
        asyncio.run(environment.seed_session(row))
    system = [{"role": "system", "content": "x"}]
    with pytest.raises(DataError, match="no message of the user"):
        bad(factory=Random, dataset=[{"prompt": system}])().task(0)


def test_types_of_arguments():
    def tool(
        *, a: list[str], b: dict, c: Literal["x", "y"], d: str | None, e: float, f: bool, g: list
    ):
        """Do."""

    properties = tool_of_function(tool).parameters["properties"]
    assert properties == {
        "a": {"type": "array", "items": {"type": "string"}}, "b": {"type": "object"},
        "c": {"enum": ["x", "y"]}, "d": {"type": ["string", "null"]}, "e": {"type": "number"},
        "f": {"type": "boolean"}, "g": {"type": "array"},
    }  # fmt: skip


PLAYABLE = [name for name, kind in BUILT_IN.items() if kind.step is Environment.step]


@pytest.mark.parametrize("name", PLAYABLE)
def test_ours_are_played_as_trl_plays(name):
    """What its trainer does: an object for each rollout, its methods as tools, then the rewards."""
    environment = load_environment(name)
    ours = for_trl(environment, num_tasks=3, split="held_out")
    rollouts, completions = [], []
    for row in ours.dataset:
        rollout = ours.factory()
        assert rollout.reset(**row) is None
        completion = []
        for turn in environment.solve(json.loads(row["row"])):
            thinking = f"<think>{turn.reasoning}</think>" if turn.reasoning else ""
            message = {"role": "assistant", "content": thinking + turn.content}
            calls = [
                {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
                for c in turn.tool_calls
            ]
            completion.append(message | ({"tool_calls": calls} if calls else {}))
            for call in turn.tool_calls:
                said = getattr(rollout, call.name)(**call.arguments)
                completion.append({"role": "tool", "name": call.name, "content": said})
        rollouts.append(rollout)
        completions.append(completion)
    rewards = ours.reward(prompts=None, completions=completions, environments=rollouts, row=None)
    assert rewards == [1.0] * 3
    fresh = [ours.factory() for _ in ours.dataset]
    for rollout, row in zip(fresh, ours.dataset, strict=True):
        rollout.reset(**row)
    empty = [[{"role": "assistant", "content": ""}]] * 3
    assert all(reward < 1.0 for reward in ours.reward(completions=empty, environments=fresh))


@pytest.mark.parametrize("name", [name for name in PLAYABLE if BUILT_IN[name]().tools])
def test_tools_have_the_schemas_that_transformers_reads(name):
    environment = load_environment(name)
    rollout = for_trl(environment, num_tasks=4).factory()
    for tool in tools_of(environment.task(0)):
        schema = get_json_schema(getattr(rollout, tool.name))["function"]
        assert schema["name"] == tool.name
        assert schema["description"] == tool.description
        wanted = tool.parameters.get("properties", {})
        found = schema["parameters"].get("properties", {})
        assert found.keys() == wanted.keys()
        for key, each in wanted.items():
            assert found[key].get("type", "string") == each.get("type", "string")
        assert schema["parameters"].get("required", []) == tool.parameters.get("required", [])


def test_failures_are_no_rewards_in_trl():
    class Down(CounterEnvironment):
        name = "down"

        async def run_tool(self, session, name, arguments):
            raise RolloutFailedError(FailureKind.TOOL, f"{name}({arguments}) of {session}")

    ours = for_trl(Down(), num_tasks=1)
    rollout = ours.factory()
    rollout.reset(**ours.dataset[0])
    with pytest.raises(RolloutFailedError):
        rollout.add(number=1)
    assert ours.reward(completions=["done"], environments=[rollout]) == [None]

    async def inside_a_loop():
        rollout.reset(**ours.dataset[0])
        return ours.reward(completions=["done"], environments=[rollout])

    assert asyncio.run(inside_a_loop()) == [0.0]
    with pytest.raises(ConfigError, match="where TRL ends a rollout"):
        for_trl(load_environment("guess_number"), num_tasks=1)
