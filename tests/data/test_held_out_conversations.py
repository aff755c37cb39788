"""The choice of held-out conversations: by content, one side for equal ones."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.data.conversations import parse_conversation
from nemotron3.data.held_out_conversations import choose_held_out, content_of, without
from nemotron3.errors import DataError


def conversation(prompt, completion="4", **columns):
    row = {"prompt": prompt, "completion": completion} | columns
    return parse_conversation(json.dumps(row), place="here")


def parsed(messages, **columns):
    return parse_conversation(json.dumps({"messages": messages} | columns), place="here")


@settings(deadline=None)
@given(
    numbers=st.lists(
        st.lists(st.integers(0, 30), min_size=2, max_size=12).filter(lambda n: len(set(n)) > 1),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 5),
    fraction=st.sampled_from([0.01, 0.3, 0.9]),
)
def test_no_conversation_is_on_both_sides_and_every_source_holds_out(numbers, seed, fraction):
    sources = {
        f"source {i}": [conversation(f"say {n}") for n in own] for i, own in enumerate(numbers)
    }
    options = {"fraction": fraction, "most": 4, "seed": seed, "fits": lambda _: True}
    chosen = choose_held_out(sources, **options)
    for own in sources.values():
        assert chosen & {content_of(row) for row in own}
    left = [row for rows in sources.values() for row in rows if content_of(row) not in chosen]
    if all({content_of(row) for row in own} - chosen for own in sources.values()):
        assert [row for rows in without(sources, chosen).values() for row in rows] == left
    else:
        with pytest.raises(DataError, match="are held out, by it or by other sources"):
            without(sources, chosen)
    backwards = {name: rows[::-1] for name, rows in reversed(sources.items())}
    assert choose_held_out(backwards, **options) == chosen


def test_another_seed_holds_out_others():
    sources = {"one": [conversation(f"say {n}") for n in range(40)]}
    options = {"fraction": 0.2, "most": 100, "fits": lambda _: True}
    first, second = (choose_held_out(sources, seed=seed, **options) for seed in (0, 1))
    assert len(first) == len(second) == 8
    assert first != second


def test_conversations_that_read_alike_are_the_same():
    call = {"id": "a1", "function": {"name": "add", "arguments": {"x": 1, "y": 2}}}
    other_call = {"function": {"name": "add", "arguments": '{"y": 2, "x": 1}'}}
    user = {"role": "user", "content": "2+2?"}
    one = [user, {"role": "assistant", "tool_calls": [call], "reasoning": " two "}]
    two = [
        {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
        {"role": "assistant", "tool_calls": [other_call], "content": "<think>two</think>"},
    ]
    tool = {"name": "add", "parameters": {"type": "object", "properties": {}}}
    first = parsed(one, tools=[tool])
    assert content_of(first) == content_of(parsed(two, tools=[{"function": tool}]))
    assert content_of(first) != content_of(parsed(one))
    assert content_of(first) != content_of(parsed([{**user, "role": "system"}, *one], tools=[tool]))


@pytest.mark.parametrize("limit", [0, 5])
def test_only_what_fits_is_held_out(limit):
    sources = {"one": [conversation("x" * n) for n in range(1, 40)]}
    chosen = choose_held_out(
        sources,
        fraction=0.5,
        most=100,
        seed=0,
        fits=lambda row: len(row.messages[0].content) <= limit,
    )
    assert chosen == {content_of(conversation("x" * n)) for n in range(1, limit + 1)}
