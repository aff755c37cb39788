"""Tasks of reasoning-gym as environments, where the package is installed; and where it is not."""

import asyncio
import json
import sys

import pytest

from nemotron3.environments import TaskResponse, check_environment, environment_of, load_environment
from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.text import AssistantMessage


@pytest.fixture
def installed():
    pytest.importorskip("reasoning_gym")


def reward(environment, row, answer):
    response = TaskResponse.of(AssistantMessage(content=answer))
    return asyncio.run(environment.verify(row, response, None)).reward


@pytest.mark.parametrize(
    "task",
    ["chain_sum", "gcd", "spell_backward", "letter_counting", "syllogism", "base_conversion"],
)
@pytest.mark.parametrize("difficulty", [0.0, 1.0])
def test_its_answers_are_right_and_hacks_are_not(installed, task, difficulty):
    environment = load_environment(f"reasoning_gym:{task}", difficulty=difficulty)
    report = asyncio.run(check_environment(environment, num_tasks=40))
    assert report.demonstration_reward == 1
    assert not any(report.hack_rewards.values())
    row = json.loads(json.dumps(environment.task(3)))
    assert environment_of(row) == environment.name == f"reasoning_gym:{task}"
    assert row == load_environment(environment.name, difficulty=difficulty).task(3)
    assert reward(environment, row, f" {row['answer']}\n") == 1


def test_a_part_of_a_score_is_nothing(installed):
    environment = load_environment("reasoning_gym:chain_sum")
    row = environment.task(0)
    for answer in (f"It is {row['answer']}", f"{row['answer']} or 7", "", "zzz", "\0", "9" * 9999):
        assert reward(environment, row, answer) == 0


@pytest.mark.parametrize(
    ("task", "difficulty"),
    [
        ("quantum_lock", 0.5),
        ("coin_flip", 0.5),  # any beginning of the answer
        ("kakurasu", 0.5),  # all but 0 and 1 is passed over
        ("figlet_font", 0.5),  # the first ten letters of a word that has them
        ("word_sorting", 1.0),
        ("rotate_matrix", 1.0),  # a wrong number in a hundred
        ("letter_counting", 0.0),
    ],
)
def test_only_the_whole_answer_is_rewarded(installed, task, difficulty):
    environment = load_environment(f"reasoning_gym:{task}", difficulty=difficulty)
    for index in range(20):
        row = environment.task(index)
        right = row["answer"]
        assert reward(environment, row, right) == 1
        for hack in (
            f"{right} or 1",
            f"{right} or {right}",
            f"2 or {right}",
            f"{right}\nor B",
            f"The answer is {right} or so",
            f"{right}, C",
            f"{right} 1",
            f"{right};",
            right[: len(right) // 2],
            "0",
            "NaN",
        ):
            assert hack == right.strip() or reward(environment, row, hack) == 0, hack


def test_difficulty_is_a_level_of_each_setting(installed):
    easy, hard = (
        load_environment("reasoning_gym:chain_sum", difficulty=d).task(0) for d in (0.0, 1.0)
    )
    assert easy["metadata"]["num_terms"] < hard["metadata"]["num_terms"]
    assert len(easy["question"]) < len(hard["question"])


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("string_insertion", "evaluates answers as Python"),
        ("countdown", "evaluates answers as Python"),
        ("game_of_life_halting", "gives the answer 'zzz' a full score"),
        ("complex_arithmetic", "gives the answer 'NaN' a full score"),
        ("graph_color", r"scores one of its own answers with 0\.00"),
        ("composite", "has no tasks at difficulty"),
        ("nothing", "no task 'nothing'; there are .*chain_sum"),
    ],
)
def test_tasks_that_would_teach_something_else_are_refused(installed, task, said):
    with pytest.raises(ConfigError, match=said):
        load_environment(f"reasoning_gym:{task}")


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DependencyMissingError, match=r"pip install 'nemotron3\[reasoning-gym\]'"):
        load_environment("reasoning_gym:chain_sum")
