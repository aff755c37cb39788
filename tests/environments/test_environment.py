"""The interface: tasks by counters, tools with schemas, conversations, failures."""

import asyncio
import math

import pytest

from nemotron3.environments import (
    Environment,
    FailureKind,
    RolloutFailedError,
    Split,
    TaskResponse,
    Verification,
    load_environment,
    make_row,
    prompt_text,
    split_of,
)
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import AssistantMessage, Tool, ToolCall, ToolMessage, UserMessage

ADD = Tool(
    name="add",
    parameters={
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
    },
)


class Counter(Environment):
    """Adds up what a tool is given, then asks how much it is."""

    name = "counter"
    tools = (ADD,)
    max_turns = 5

    def draw(self, random):
        return self.row(f"Reach {random.randint(0, 10**6)}.", goal=3)

    async def seed_session(self, row):
        del row
        return {"total": 0, "asked": False}

    async def run_tool(self, session, name, arguments):
        del name
        if arguments["n"] < 0:
            raise RolloutFailedError(FailureKind.TOOL, "the adder is out of order")
        session["total"] += arguments["n"]
        return str(session["total"])

    async def step(self, session, turn):
        del turn
        if session["asked"]:
            return None
        session["asked"] = True
        return "How much is it?"

    async def verify(self, row, response, session):
        return Verification.all_of(
            {"state": session["total"] == row["goal"], "said": response.answer == "3"}
        )

    def solve(self, row):
        del row
        calls = (
            ToolCall(name="add", arguments={"n": 1}, id="a"),
            ToolCall(name="add", arguments={"n": 2}, id="b"),
        )
        return [
            AssistantMessage(tool_calls=calls),
            AssistantMessage(content="Done."),
            AssistantMessage(content="3"),
        ]


def call(environment, session, name, **arguments):
    return asyncio.run(environment.call_tool(session, name, arguments))


def test_a_demonstration_is_played_with_tools_and_user():
    environment = Counter()
    response = asyncio.run(environment.demonstration(environment.task(0)))
    assert [type(message) for message in response.messages] == [
        AssistantMessage,
        ToolMessage,
        ToolMessage,
        AssistantMessage,
        UserMessage,
        AssistantMessage,
    ]
    assert [m.content for m in response.messages if isinstance(m, ToolMessage)] == ["1", "3"]
    assert response.is_complete
    assert response.answer == "3"


def test_an_unfinished_play_is_not_complete():
    environment = Counter()
    row = environment.task(0)
    response, _ = asyncio.run(environment.play(row, environment.solve(row)[:-1]))
    assert not response.is_complete
    assert response.answer == ""
    with pytest.raises(DataError, match="ended before the last turn"):
        asyncio.run(environment.play(row, [*environment.solve(row), AssistantMessage()]))


def test_a_wrong_call_is_told_what_is_wrong():
    environment, session = Counter(), {"total": 0}
    assert call(environment, session, "sub", n=1) == "error: there is no tool sub"
    assert call(environment, session, "add") == "error: the call has no n"
    assert call(environment, session, "add", n="1") == "error: n is not integer"
    assert call(environment, session, "add", n=True) == "error: n is not integer"
    said = call(environment, session, "add", n=1, m=2)
    assert said == "error: the call has m, which is not asked for"
    assert session["total"] == 0


def test_a_tool_out_of_order_is_a_failure_and_no_answer():
    environment = Counter()
    with pytest.raises(RolloutFailedError, match="out of order") as failed:
        call(environment, {"total": 0}, "add", n=-1)
    assert failed.value.failure.kind is FailureKind.TOOL


def test_groups_are_verified_together_by_default_one_by_one():
    environment = Counter()
    row = environment.task(0)
    good, good_session = asyncio.run(environment.play(row, environment.solve(row)))
    bad = TaskResponse.of({"role": "assistant", "content": "3"})
    judged = asyncio.run(
        environment.verify_group(row, [good, bad], [good_session, {"total": 0, "asked": True}])
    )
    assert [verification.reward for verification in judged] == [1.0, 0.0]
    assert judged[1].components == {"state": 0.0, "said": 1.0}


def test_splits_are_sides_of_the_prompt_for_any_seed_and_difficulty():
    held_out = {prompt_text(row) for row in load_environment("math").distinct_tasks(200, seed=1)}
    for difficulty in (0.0, 0.5):
        environment = load_environment("math", difficulty=difficulty)
        for index in range(200):
            row = environment.task(index, split="train", seed=index % 3)
            assert split_of(row) is Split.TRAIN
            assert prompt_text(row) not in held_out
    row = environment.task(0)
    assert split_of({**row, "difficulty": 1, "expected_answer": "?"}) is Split.TRAIN


def test_one_prompt_in_eight_is_held_out():
    sides = [split_of(make_row("any", f"prompt {i}")) for i in range(4000)]
    assert sides.count(Split.HELD_OUT) == pytest.approx(500, abs=70)


def test_too_few_prompts_are_an_error():
    class One(Counter):
        def draw(self, random):
            return self.row(f"Say {random.randint(0, 20)}.")

    with pytest.raises(DataError, match=r"different prompts, 40 are wanted"):
        One().distinct_tasks(40)

    class Only(Counter):
        def draw(self, random):
            del random
            return self.row("Say 1.")

    side = split_of(Only().draw(None))
    other = Split.TRAIN if side is Split.HELD_OUT else Split.HELD_OUT
    with pytest.raises(DataError, match=f"none of 2000 tasks is {other}"):
        Only().task(0, split=other)


@pytest.mark.parametrize("difficulty", [-0.1, 1.1, math.nan, math.inf])
def test_difficulties_are_from_0_to_1(difficulty):
    with pytest.raises(ConfigError, match="from 0 to 1"):
        Counter(difficulty=difficulty)


def test_unknown_splits_and_missing_parts_are_errors():
    with pytest.raises(ConfigError, match="no split 'test'; there are train, held_out"):
        next(Counter().tasks("test"))

    class Nameless(Counter):
        name = ""

    with pytest.raises(ConfigError, match="Nameless has no name"):
        Nameless()

    class Silent(Counter):
        solve = Environment.solve

    with pytest.raises(DataError, match="counter has no demonstrations"):
        Silent().solve(Silent().task(0))


def test_a_verification_is_a_reward_or_a_failure():
    assert Verification(reward=0.0).failure is None
    failed = Verification.failed(FailureKind.JUDGE, "no answer in 60 s")
    assert failed.reward is None
    assert failed.failure.kind == "judge_failed"
    with pytest.raises(DataError, match="give one of them"):
        Verification()
    with pytest.raises(DataError, match="give one of them"):
        Verification(reward=0.0, failure=failed.failure)
    with pytest.raises(DataError, match="no components"):
        Verification.all_of({})
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="finite"):
            Verification(reward=bad)
        with pytest.raises(DataError, match="finite"):
            Verification(reward=1.0, components={"part": bad})
