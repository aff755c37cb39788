"""Constraints: each is asked for, each can be kept, and each can be broken."""

import asyncio
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.environments import TaskResponse, load_environment
from nemotron3.environments.constraints import CONSTRAINTS
from nemotron3.environments.instruction_following import InstructionFollowing, draw_text
from nemotron3.errors import ConfigError, DataError

KEPT_AND_BROKEN = {
    "length:number_words": ({"n": 2}, "red sun", "red"),
    "length:number_sentences": ({"n": 2}, "Red. Sun!", "Red."),
    "length:number_lines": ({"n": 2}, "red\n\nsun", "red sun"),
    "length:number_paragraphs": ({"n": 2}, "red\n\nsun", "red\nsun"),
    "length:number_bullets": ({"n": 2}, "* red\n- sun", "* red\nsun"),
    "length:numbered_list": ({"n": 2}, "1. red\n2. sun", "1. red\n1. sun"),
    "length:at_most_words": ({"n": 2}, "red", "red sun moon"),
    "length:max_characters": ({"n": 4}, "red", "red sun"),
    "words:distinct": ({}, "red sun", "red Red"),
    "words:sorted": ({}, "red sun", "sun red"),
    "words:length": ({"n": 3}, "red sun", "red moon"),
    "words:max_length": ({"n": 3}, "red sun", "red moon"),
    "case:lowercase": ({}, "red", "Red"),
    "case:uppercase": ({}, "RED", "Red"),
    "case:title": ({}, "Red Sun", "Red sun"),
    "case:number_capital_words": ({"n": 1}, "RED sun", "RED SUN"),
    "start:first_word": ({"word": "red"}, "Red sun", "sun red"),
    "end:last_word": ({"word": "sun"}, "red sun.", "sun red"),
    "end:mark": ({"mark": "!"}, "red!", "red."),
    "letters:first_letter": ({"letter": "r"}, "red Rose", "red sun"),
    "letters:avoid": ({"letter": "e"}, "sun", "red"),
    "letters:frequency": ({"letter": "e", "n": 2}, "red bed", "red"),
    "keywords:include": ({"word": "red"}, "a Red sun", "a reddish sun"),
    "keywords:exclude": ({"word": "red"}, "a reddish sun", "a Red sun"),
    "keywords:frequency": ({"word": "red", "n": 2}, "red RED", "red"),
    "punctuation:no_comma": ({}, "red sun", "red, sun"),
    "punctuation:number_commas": ({"n": 2}, "red, sun, moon", "red, sun"),
    "punctuation:quoted": ({}, '"red sun"', '"red" sun'),
    "format:title": ({}, "<<Red>>\nsun", "Red\nsun"),
    "format:placeholders": ({"n": 1}, "a [red] sun", "a red sun"),
    "format:postscript": ({}, "red\nP.S. sun", "red P.S. sun"),
    "format:separator": ({}, "red\n***\nsun", "red\nsun"),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_is_kept_and_broken(name):
    kwargs, kept, broken = KEPT_AND_BROKEN[name]
    constraint = CONSTRAINTS[name]
    assert constraint.holds(kept, kwargs)
    assert not constraint.holds(broken, kwargs)
    assert constraint.ask(kwargs)


def test_there_are_enough_and_all_are_asked_for():
    assert len(CONSTRAINTS) >= 25
    asked = Counter()
    for difficulty in (0.3, 1.0):
        environment = load_environment("instruction_following", difficulty=difficulty)
        for index in range(700):
            asked.update(environment.task(index)["instruction_id_list"])
    assert set(asked) == set(CONSTRAINTS)


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_what_is_measured_holds(seed, difficulty):
    random = Random(seed)
    text = draw_text(random, difficulty)
    for constraint in CONSTRAINTS.values():
        kwargs = constraint.measure(text, random)
        assert kwargs is None or constraint.holds(text, kwargs)


@given(st.text())
def test_any_text_is_judged(text):
    for name, (kwargs, *_) in KEPT_AND_BROKEN.items():
        assert CONSTRAINTS[name].holds(text, kwargs) in (True, False)


def judged(environment, row, text):
    response = TaskResponse.of({"role": "assistant", "content": text})
    return asyncio.run(environment.verify(row, response, None))


def test_part_of_the_constraints_is_part_of_the_reward_where_asked_for():
    row = {
        "instruction_id_list": ["length:number_words", "case:uppercase"],
        "kwargs": [{"n": 2}, {}],
        "grading_mode": "fraction",
    }
    environment = InstructionFollowing(grading_mode="fraction")
    assert judged(environment, row, "RED SUN").reward == 1
    assert judged(environment, row, "red sun").reward == 0.5
    assert judged(environment, row, "").reward == 0
    assert judged(environment, {**row, "grading_mode": "binary"}, "red sun").reward == 0
    assert environment.task(0)["grading_mode"] == "fraction"
    with pytest.raises(ConfigError, match="the modes are binary, fraction"):
        InstructionFollowing(grading_mode="half")


def test_rows_with_unknown_constraints_are_refused():
    environment = InstructionFollowing()
    with pytest.raises(DataError, match="'length:haiku', which is no known constraint"):
        judged(environment, {"instruction_id_list": ["length:haiku"], "kwargs": [{}]}, "x")
    with pytest.raises(DataError, match="1 constraints and 0 kwargs"):
        judged(environment, {"instruction_id_list": ["case:title"], "kwargs": []}, "x")


@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_no_text_learned_by_heart_keeps_the_constraints_of_many_tasks(difficulty):
    environment = load_environment("instruction_following", difficulty=difficulty)
    rows = [environment.task(i) for i in range(80)]
    for index in range(30):
        text = environment.task(index, seed=9)["solution"]
        assert sum(judged(environment, row, text).reward for row in rows) <= 20


@pytest.mark.parametrize("piece", ["a", "a ", " ", "\n", "\n ", "[", "<<", "1. ", "* ", ".", "a,"])
def test_long_texts_do_not_make_a_check_hang(piece):
    text = piece * (20_000 // len(piece))
    for name, (kwargs, *_) in KEPT_AND_BROKEN.items():
        assert CONSTRAINTS[name].holds(text, kwargs) in (True, False)
