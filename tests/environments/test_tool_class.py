"""Classes whose methods are tools."""

import asyncio
import math
from typing import Literal

import pytest

from nemotron3.environments import TaskResponse, load_environment, prompt_text, tools_of
from nemotron3.environments.tool_class import ToolClassEnvironment
from nemotron3.errors import ConfigError
from nemotron3.text import AssistantMessage, ToolCall


class Counter:
    def reset(self, start: int) -> str:
        self.value = start
        return f" It is at {start}."

    def increment(self, by: int = 1) -> int:
        """Add to the counter."""
        self.value += by
        return self.value

    async def divide(self, by: int) -> float:
        """Divide the counter."""
        self.value /= by
        return self.value

    def _hidden(self):
        raise AssertionError

    def get_reward(self) -> float:
        return float(self.value == 10)


class Counting(ToolClassEnvironment):
    """Bring a counter to 10."""

    name = "counting"
    tool_class = Counter

    def draw(self, random):
        return self.row("Bring the counter to 10.", start=random.randint(0, 9))


def turn(name, **arguments):
    return AssistantMessage(tool_calls=(ToolCall(name=name, arguments=arguments),))


DONE = AssistantMessage(content="done")


def play(environment, row, *turns, is_complete=True):
    async def playing():
        response, session = await environment.play(row, turns)
        response = TaskResponse(messages=response.messages, is_complete=is_complete)
        return response, await environment.verify(row, response, session)

    return asyncio.run(playing())


def test_methods_are_tools_and_the_object_gives_the_reward():
    environment = Counting()
    row = environment.task(0)
    start = row["start"]
    assert prompt_text(row) == f"Bring the counter to 10. It is at {start}."
    tools = {tool.name: tool for tool in tools_of(row)}
    assert tools.keys() == {"increment", "divide"}
    assert tools["increment"].description == "Add to the counter."
    assert tools["increment"].parameters == {
        "type": "object",
        "properties": {"by": {"type": "integer"}},
        "required": [],
    }
    response, verification = play(environment, row, turn("increment", by=10 - start), DONE)
    assert response.messages[1].content == "10"
    assert verification.reward == 1
    assert play(environment, row, turn("increment", by=11 - start), DONE)[1].reward == 0
    assert play(environment, row, DONE)[1].reward == 0
    cut = play(environment, row, turn("increment", by=10 - start), DONE, is_complete=False)
    assert cut[1].reward == 0


def test_wrong_calls_are_answered():
    environment = Counting()
    row = environment.task(0)
    calls = [turn("divide", by=0), turn("increment", by="x"), turn("_hidden"), turn("get_reward")]
    response, _ = play(environment, row, *calls, turn("divide", by=2), DONE)
    said = [message.content for message in response.messages if not hasattr(message, "tool_calls")]
    assert said[0] == "error: float division by zero" or said[0].startswith("error: division")
    assert all(text.startswith("error: ") for text in said[:4])
    assert float(said[4]) == row["start"] / 2


def test_rollouts_have_objects_of_their_own():
    environment = Counting()
    row = environment.task(0)
    one, two = (asyncio.run(environment.seed_session(row)) for _ in range(2))
    one.increment(by=5)
    assert two.value == row["start"]


def made(reset=lambda _: None, reward=lambda _: 0.0, **methods):
    kind = type("Mine", (), {"reset": reset, "get_reward": reward, **methods})
    fields = {"name": "mine", "tool_class": kind, "draw": lambda self, _: self.row("?", a=1)}
    return type("Some", (ToolClassEnvironment,), fields)


def test_annotations_become_schemas():
    def tool(self, a: list[int], b: Literal["x", "y"], c: int | None = None, d: dict = {}): ...  # noqa: B006

    (found,) = made(tool=tool)().tools
    assert found.parameters["properties"] == {
        "a": {"type": "array", "items": {"type": "integer"}},
        "b": {"enum": ["x", "y"]},
        "c": {"type": ["integer", "null"]},
        "d": {"type": "object"},
    }
    assert found.parameters["required"] == ["a", "b"]


def test_classes_that_cannot_be_used_are_refused():
    def untyped(self, x): ...
    def many(self, *x: int): ...
    def strange(self, x: set[int]): ...

    for method, said in (
        (untyped, "argument x of .*untyped has no type"),
        (many, "stands for many"),
        (strange, r"is of type set\[int\]"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(tool=method)()
    with pytest.raises(ConfigError, match="Mine has no method get_reward"):
        made(reward=None)()
    with pytest.raises(ConfigError, match="has no tool_class"):
        type("Some", (ToolClassEnvironment,), {"name": "x", "draw": lambda *_: {}})()
    with pytest.raises(ConfigError, match=r"Mine\.reset does not take the fields .*'a'"):
        made()().task(0)


def test_a_reward_that_is_no_number_is_refused():
    environment = made(reset=lambda _, **__: None, reward=lambda _: math.nan)()
    with pytest.raises(ValueError, match="finite number"):
        play(environment, environment.task(0), DONE)


def test_it_is_found_in_a_file(tmp_path):
    file = tmp_path / "counting.py"
    file.write_text(
        "from nemotron3.environments.tool_class import ToolClassEnvironment\n"
        "class Tools:\n"
        "    def reset(self, n: int): self.n = n\n"
        "    def look(self) -> int:\n        return self.n\n"
        "    def get_reward(self): return 1\n"
        "class Looking(ToolClassEnvironment):\n"
        "    name = 'looking'\n    tool_class = Tools\n"
        "    def draw(self, random): return self.row('Look.', n=random.randint(0, 999))\n",
        encoding="utf-8",
    )
    environment = load_environment(str(file))
    row = environment.task(0)
    response, _ = play(environment, row, turn("look"), DONE)
    assert response.messages[1].content == str(row["n"])
