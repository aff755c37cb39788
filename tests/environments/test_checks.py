"""The check of an environment finds what is wrong with it."""

import asyncio
import math

import pytest

from nemotron3.environments import (
    Environment,
    FailureKind,
    RolloutFailedError,
    Verification,
    check_environment,
)
from nemotron3.errors import DataError
from nemotron3.text import AssistantMessage


class Naive(Environment):
    """Asks for yes or no, and looks for the answer anywhere in what was said."""

    name = "naive"

    def draw(self, random):
        number = random.randrange(1000)
        return self.row(f"Is {number} over 99? yes or no", answer="yes" if number > 99 else "no")

    async def verify(self, row, response, session):
        del session
        last = response.turns[-1]
        said = f"{last.reasoning} {last.content}"
        return Verification.all_of({"said": row["answer"] in said})

    def solve(self, row):
        return [AssistantMessage(content=row["answer"], reasoning="compare")]


def test_a_naive_verifier_is_found_out():
    report = asyncio.run(check_environment(Naive(), num_tasks=200))
    assert report.demonstration_reward == 1
    assert report.hack_rewards == {
        "empty answer": 0,
        "prompt repeated": 1,
        "answer in the reasoning alone": 1,
        "answer twenty times": 1,
        "answer without the tools": 0,
        "answer cut off": 1,
    }
    assert report.top_answer == "yes"
    assert report.top_answer_share > 0.7
    assert report.num_distinct_prompts < 130
    assert report.num_failures == 0


def test_failures_are_in_no_mean():
    class Flaky(Naive):
        async def verify(self, row, response, session):
            if row["answer"] == "no":
                return Verification.failed(FailureKind.JUDGE, "no reply")
            return await super().verify(row, response, session)

    report = asyncio.run(check_environment(Flaky(), num_tasks=200))
    assert report.num_failures > 0
    assert report.num_failures % 7 == 0
    assert report.demonstration_reward == 1

    class Down(Naive):
        async def seed_session(self, row):
            del row
            raise RolloutFailedError(FailureKind.ENVIRONMENT, "the server is down")

    report = asyncio.run(check_environment(Down(), num_tasks=3))
    assert report.num_failures == 21
    assert math.isnan(report.demonstration_reward)


def test_a_check_without_solutions():
    class Silent(Naive):
        solve = Environment.solve

    report = asyncio.run(check_environment(Silent(), num_tasks=9))  # what needs none is played
    assert report.hack_rewards.keys() == {"empty answer", "prompt repeated"}
    assert math.isnan(report.demonstration_reward)
    assert (report.top_answer_share, report.num_turns, report.num_failures) == (0.0, 0, 0)

    class Empty(Naive):
        def solve(self, row):
            del row
            return []

    with pytest.raises(DataError, match="gives no turns"):
        asyncio.run(check_environment(Empty()))
