"""What holds for every built-in environment, at every difficulty."""

import asyncio
import json
from collections import Counter
from itertools import islice, pairwise

import pytest

from nemotron3.environments import (
    BUILT_IN,
    Split,
    TaskResponse,
    check_environment,
    environment_of,
    load_environment,
    prompt_text,
    split_of,
    tools_of,
)
from nemotron3.text import AssistantMessage, ToolCall

DIFFICULTIES = (0.0, 0.3, 0.6, 1.0)
TOP_SHARE = {"over_refusal": 0.42, "multiple_choice": 0.33, "letter_counting": 0.28}
"""The most that one answer may be the right one, where it is more than a fifth."""
JUDGED_BY_STATE = {"workplace": {"prompt repeated", "answer twenty times"}}
"""Where the last turn is not judged by its words."""

each = pytest.mark.parametrize("name", BUILT_IN)
everywhere = pytest.mark.parametrize("difficulty", DIFFICULTIES)
at_three = pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])


def build(name, difficulty):
    return load_environment(name, difficulty=difficulty)


def reward(environment, row, *turns):
    async def play():
        response, session = await environment.play(row, turns)
        return (await environment.verify(row, response, session)).reward

    return asyncio.run(play())


@each
@everywhere
def test_demonstrations_are_right_and_hacks_are_not(name, difficulty):
    environment = build(name, difficulty)
    report = asyncio.run(check_environment(environment, num_tasks=80, seed=3))
    assert report.demonstration_reward == 1
    assert report.num_turns <= environment.max_turns
    rewarded = {hack for hack, value in report.hack_rewards.items() if value}
    assert rewarded <= JUDGED_BY_STATE.get(name, set())
    assert len(report.hack_rewards) == 6


@each
@at_three
def test_there_are_three_hundred_held_out_prompts(name, difficulty):
    rows = build(name, difficulty).distinct_tasks(300)
    assert len({prompt_text(row) for row in rows}) == 300
    assert {split_of(row) for row in rows} == {Split.HELD_OUT}


@each
@at_three
def test_no_answer_is_the_right_one_too_often(name, difficulty):
    environment = build(name, difficulty)
    if name == "workplace":  # judged by its calls, of which the first is the one to guess
        answers = Counter(
            json.dumps(environment.task(i)["ground_truth"][0], sort_keys=True) for i in range(400)
        )
    else:
        answers = Counter(environment.solve(environment.task(i))[-1].content for i in range(400))
    (_, count), *_ = answers.most_common(1)
    assert count / 400 <= TOP_SHARE.get(name, 0.2)


@each
def test_tasks_are_a_function_of_seed_and_index(name):
    environment = build(name, 0.6)
    first = list(islice(environment.tasks("train", seed=5), 12))
    again = [build(name, 0.6).task(i, split="train", seed=5) for i in reversed(range(12))]
    assert first == again[::-1]
    assert first != [environment.task(i, seed=6) for i in range(12)]
    assert {split_of(row) for row in first} == {Split.TRAIN}


@each
def test_rows_are_json_and_say_whose_they_are(name):
    environment = build(name, 0.9)
    for index in range(20):
        row = environment.task(index)
        assert json.loads(json.dumps(row)) == row
        assert environment_of(row) == name
        assert all(tool in environment.tools for tool in tools_of(row))
        assert bool(tools_of(row)) == bool(environment.tools)
        assert set(row["responses_create_params"]) == {"input", "tools", "parallel_tool_calls"}


@each
def test_demonstrations_survive_the_wire_of_nemo_gym(name):
    environment = build(name, 0.7)
    for index in range(20):
        row = json.loads(json.dumps(environment.task(index)))
        turns = environment.solve(row)
        response, session = asyncio.run(environment.play(row, turns))
        read = TaskResponse.from_gym(json.loads(json.dumps(response.to_gym())))
        assert read == response
        assert asyncio.run(environment.verify(row, read, session)).reward == 1


@each
def test_an_answer_of_another_task_is_wrong(name):
    environment = build(name, 0.5)
    rows = environment.distinct_tasks(60)
    if name == "guess_number":  # another game's guesses are as good as any, until one is right
        return
    wrong = [reward(environment, row, *environment.solve(other)) for row, other in pairwise(rows)]
    assert sum(wrong) <= 0.42 * len(wrong)


@each
def test_strange_responses_are_judged_and_do_not_raise(name):
    environment = build(name, 0.5)
    row = environment.task(1)
    for text in ["\0", "💥" * 50, "9" * 5000, "{" * 3000, "[" * 30000, "a: &x [*x]", "<r/>", "-"]:
        assert reward(environment, row, AssistantMessage(content=text)) == 0
    call = ToolCall(name="no_such_tool", arguments={"x": [None]})
    assert reward(environment, row, AssistantMessage(tool_calls=(call,))) == 0
    assert asyncio.run(environment.call_tool(None, "no_such_tool", {})).startswith("error: ")
    nothing = TaskResponse(messages=())
    session = asyncio.run(environment.seed_session(row))
    assert asyncio.run(environment.verify(row, nothing, session)).reward == 0


@each
def test_rollouts_do_not_share_their_state(name):
    environment = build(name, 0.5)
    rows = [environment.task(i) for i in range(3)]
    before = json.dumps(rows)

    async def play_all():
        played = await asyncio.gather(
            *(environment.play(row, environment.solve(row)) for row in rows + rows)
        )
        judged = [
            environment.verify(row, *pair) for row, pair in zip(rows + rows, played, strict=True)
        ]
        return [verification.reward for verification in await asyncio.gather(*judged)]

    assert asyncio.run(play_all()) == [1] * 6
    assert json.dumps(rows) == before


@each
def test_prompts_are_compact_where_they_are_easy(name):
    prompts = [prompt_text(build(name, 0.0).task(i)) for i in range(100)]
    assert max(map(len, prompts)) <= 160


@each
@everywhere
def test_every_turn_of_a_demonstration_reasons_a_little(name, difficulty):
    environment = build(name, difficulty)
    for index in range(40):
        for turn in environment.solve(environment.task(index)):
            assert turn.reasoning
            assert turn.reasoning.strip() != turn.content.strip()
