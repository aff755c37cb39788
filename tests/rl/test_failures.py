"""Environments that raise: failures of rollouts, which name the line; a run stops where all do."""

import asyncio
import json
import logging
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from nemotron3.environments import RolloutFailedError, TaskResponse, Verification
from nemotron3.environments.environment import Environment
from nemotron3.environments.failures import failure_of_error
from nemotron3.environments.verification import FailureKind
from nemotron3.errors import BackendUnavailableError, DataError
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.rl.failures import check_rewards
from nemotron3.rl.records import rollout_record
from nemotron3.rl.rollouts import failure_of
from nemotron3.text import AssistantMessage, Tokenizer, ToolCall
from nemotron3.text.messages import Tool
from tests.rl.playground import Parity, save_policy
from tests.rl.test_rollouts import driver_for, tasks
from tests.tiny import randomized

KINDS = {
    "seed_session": FailureKind.ENVIRONMENT,
    "call_tool": FailureKind.TOOL,
    "step": FailureKind.ENVIRONMENT,
    "verify": FailureKind.JUDGE,
    "verify_group": FailureKind.JUDGE,
}


class Raising(Environment):
    """Raises an error in one of its methods, so often."""

    name: ClassVar[str] = "raising"
    tools = (Tool(name="look", parameters={"type": "object"}),)
    max_turns = 4

    def __init__(self, where="verify", error=None, times=99):
        super().__init__()
        self.where, self.left = where, times
        self.error = KeyError("colour") if error is None else error

    def _raise(self, where):
        if where == self.where and self.left > 0:
            self.left -= 1
            raise self.error  # this line

    def draw(self, random):
        return self.row(f"say {random.randrange(10**6)}")

    async def seed_session(self, *_):
        self._raise("seed_session")

    async def call_tool(self, *_):
        self._raise("call_tool")
        return "a wall"

    async def step(self, *_):
        self._raise("step")

    async def verify(self, *_):
        self._raise("verify")
        return Verification(reward=1.0)

    async def verify_group(self, row, responses, sessions):
        self._raise("verify_group")
        return await super().verify_group(row, responses, sessions)


LINE = next(
    f"{__file__}:{number}"
    for number, line in enumerate(Path(__file__).read_text().splitlines(), start=1)
    if line.endswith("raise self.error  # this line")
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = save_policy(tmp_path_factory.mktemp("policy"))
    return randomized(LanguageModel.from_pretrained(folder)), Tokenizer.from_directory(folder)


@pytest.fixture
def calls(monkeypatch):
    """The policy cannot call tools by itself: its first turns do."""

    def turn_of(output):
        call = ToolCall(name="look", arguments={}, id="call_0")
        return AssistantMessage(content="", tool_calls=(call,))

    monkeypatch.setattr("nemotron3.rl.rollouts.turn_of", turn_of)


@pytest.mark.parametrize("where", KINDS)
def test_what_an_environment_raises_is_a_failure_that_names_the_line(
    policy,
    caplog,
    request,
    where,
):
    if where == "call_tool":
        request.getfixturevalue("calls")
    environment = Raising(where)
    # A turn that is cut off gets no answer, so only some rollouts come to tools and users.
    room = {"max_context": 2000, "engine": {"max_model_len": 2000}}
    driver = driver_for(policy, environment, Parity(), max_tokens=90, max_attempts=3, **room)
    rollouts = driver.play([*tasks(environment, 8), *tasks(Parity(), 2)], seed=1)
    failed = [each for each in rollouts[:8] if failure_of(each)]
    assert failed
    for rollout in failed:
        failure = failure_of(rollout)
        assert failure.kind is KINDS[where]
        assert failure.message == f"environment raising: {where} raised KeyError: 'colour' ({LINE})"
        assert rollout.reward is None
        assert rollout.attempts == 3
        assert rollout_record(rollout, when="now").failure == failure.message
    assert all(each.reward is not None for each in rollouts[8:])  # others go on
    (logged,) = (each for each in caplog.records if each.levelno == logging.ERROR)
    assert LINE in logged.getMessage()
    assert "raise self.error  # this line" in logged.getMessage()


def test_what_fails_once_is_tried_again(policy):
    environment = Raising(error=ZeroDivisionError(), times=1)
    (rollout,) = driver_for(policy, environment).play(tasks(environment, 1))
    assert (rollout.reward, rollout.attempts) == (1.0, 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, SystemExit])
@pytest.mark.parametrize("where", ["seed_session", "verify"])
def test_interrupts_are_no_failures(policy, error, where):
    environment = Raising(where, error=error())
    with pytest.raises(error):
        driver_for(policy, environment).play(tasks(environment, 1))


def test_what_the_machine_lacks_is_told_at_once(policy):
    environment = Raising("seed_session", error=BackendUnavailableError("no bwrap"))
    with pytest.raises(BackendUnavailableError, match="no bwrap"):
        driver_for(policy, environment).play(tasks(environment, 1))


WRONG = {
    "a number": lambda *_: _later(0.5),
    "nothing": lambda *_: _later(None),
    "a reward of text": lambda *_: _later(Verification(reward="1")),
    "no coroutine": lambda *_: Verification(reward=1.0),
}


async def _later(value):
    return value


@pytest.mark.parametrize("kind", WRONG)
def test_a_verdict_that_is_none_is_a_failure(policy, kind):
    environment = type("Wrong", (Parity,), {"name": "wrong", "verify": WRONG[kind]})()
    (rollout,) = driver_for(policy, environment).play(tasks(environment, 1))
    assert failure_of(rollout).kind is FailureKind.JUDGE
    assert "environment wrong: verify raised TypeError" in failure_of(rollout).message
    assert __file__ in failure_of(rollout).message


@pytest.mark.parametrize("found", [[], [Verification(reward=1.0)] * 2, [1.0], None])
def test_verdicts_on_a_group_are_as_many_as_its_responses(policy, found):
    environment = type(
        "Groups", (Parity,), {"name": "groups", "verify_group": lambda *_: _later(found)}
    )()
    (rollout,) = driver_for(policy, environment).play(tasks(environment, 1))
    assert "environment groups: verify_group raised TypeError" in failure_of(rollout).message


def test_one_response_that_cannot_be_judged_leaves_the_others_of_its_group():
    class Odd(Parity):
        async def verify(self, _, response, *__):
            if response.answer == "odd":
                raise LookupError
            return Verification(reward=1.0)

    environment = Odd()
    responses = [TaskResponse.of({"role": "assistant", "content": t}) for t in ("a", "odd", "b")]
    row = environment.task(0)
    found = asyncio.run(environment.verify_group(row, responses, [None] * 3))
    assert [each.reward for each in found] == [1.0, None, 1.0]
    assert "verify raised LookupError (" in found[1].failure.message


def test_numbers_of_other_libraries_become_those_of_records(policy):
    class Judge(Parity):
        async def verify(self, *_):
            return Verification(reward=np.float32(0.5), components={"a": np.int64(1)})

    (rollout,) = driver_for(policy, Judge()).play(tasks(Judge(), 1))
    record = rollout_record(rollout, when="now")
    assert [type(value) for value in (record.reward, record.components["a"])] == [float, float]


def test_an_environment_that_raises_everywhere_is_told(policy):
    environment = Raising()
    driver = driver_for(policy, environment, Parity())
    rollouts = driver.play([*tasks(environment, 2), *tasks(Parity(), 1)], group_size=2)
    with pytest.raises(
        DataError, match=r"verify raised KeyError: 'colour' .*:\d+\); all 4 rollouts"
    ):
        check_rewards(rollouts)
    check_rewards(rollouts[:2])  # a single task may be one that it cannot judge
    check_rewards(rollouts[4:])
    environment.error = RolloutFailedError(FailureKind.JUDGE, "the judge is away")
    check_rewards(driver.play(tasks(environment, 2)))  # said by the environment, so no bug


def test_the_line_is_the_authors_own_where_a_library_raises():
    async def verify(row):
        return json.loads("{")

    try:
        asyncio.run(verify(None))
    except ValueError as error:
        failure = failure_of_error(error, Parity(), "verify")
    assert failure.raised_at.startswith(f"{__file__}:")
    assert "JSONDecodeError" in failure.message
    assert "decoder.py" in failure.traceback
