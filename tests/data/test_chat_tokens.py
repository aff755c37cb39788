"""Conversations as ids and targets, and the samples that teach control of reasoning."""

import itertools

import numpy as np
import pytest

from nemotron3.data.chat_tokens import (
    ReasoningControlConfig,
    check_chat_tokens,
    tokenize_conversations,
)
from nemotron3.data.conversations import Conversation
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import ChatTemplate, Tokenizer, chat_style
from nemotron3.text.messages import AssistantMessage, ToolCall, ToolMessage, UserMessage
from nemotron3.text.vocabulary import IM_END, THINK_END

NANO, SUPER = ChatTemplate(chat_style("nano")), ChatTemplate(chat_style("super"))
THOUGHT = "two and two are four, since one and one are two"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["two and two are four\nuser\nassistant\n"] * 3, vocab_size=330)


def chat(*answers, effort=None):
    messages = []
    for answer in answers:
        messages += [UserMessage(content="2+2?"), answer]
    return Conversation(messages=tuple(messages), effort=effort, place="chats.jsonl:1")


def reasoned(number=0):
    return chat(AssistantMessage(content=f"It is {number}.", reasoning=THOUGHT))


def tokenize(tokenizer, conversations, template=NANO, seed=0, **control):
    config = ReasoningControlConfig(**control)
    return list(tokenize_conversations(conversations, template, tokenizer, config, seed=seed))


def texts(tokenizer, one):
    """Text of all, and of each stretch that is trained."""
    groups = itertools.groupby(zip(one.ids.tolist(), one.is_target, strict=True), lambda p: p[1])
    trained = [tokenizer.decode([i for i, _ in group]) for is_target, group in groups if is_target]
    return tokenizer.decode(one.ids.tolist()), trained


def test_what_the_model_writes_is_trained_with_its_end_and_nothing_else(tokenizer):
    call = AssistantMessage(tool_calls=(ToolCall(name="add", arguments={"a": 2}),))
    messages = (
        UserMessage(content="2+2?"),
        call,
        ToolMessage(content="4"),
        AssistantMessage(content="Four."),
    )
    (one,) = tokenize(tokenizer, [Conversation(messages=messages)])
    _, trained = texts(tokenizer, one)
    assert len(trained) == 2
    assert trained[0].startswith("\n<tool_call>")
    assert trained[0].endswith(IM_END)
    assert trained[1] == f"Four.{IM_END}"
    assert one.is_target[-1]
    assert len(one) == len(one.ids) - 1
    assert one.ids.dtype == np.int32


def test_without_control_every_conversation_keeps_its_reasoning(tokenizer):
    (one,) = tokenize(tokenizer, [reasoned()])
    assert texts(tokenizer, one)[1] == [f"{THOUGHT}\n</think>\nIt is 0.{IM_END}"]


def test_reasoning_in_the_content_is_read_as_reasoning(tokenizer):
    inline = chat(AssistantMessage(content=f"<think>\n{THOUGHT}\n</think>\nIt is 0."))
    (one,), (other,) = (tokenize(tokenizer, [c]) for c in (inline, reasoned()))
    assert one.ids.tolist() == other.ids.tolist()
    (stripped,) = tokenize(tokenizer, [inline], strip_fraction=1.0)
    assert THOUGHT not in texts(tokenizer, stripped)[0]


def test_stripped_answers_are_those_of_thinking_turned_off(tokenizer):
    (one,) = tokenize(tokenizer, [reasoned()], strip_fraction=1.0)
    whole, trained = texts(tokenizer, one)
    assert "<think></think>It is 0." in whole
    assert trained == [f"It is 0.{IM_END}"]


def test_cut_reasoning_keeps_the_answer_and_does_not_train_its_end(tokenizer):
    found = tokenize(tokenizer, [reasoned(n) for n in range(40)], truncate_fraction=1.0)
    lengths = set()
    for number, one in enumerate(found):
        whole, trained = texts(tokenizer, one)
        assert THOUGHT not in whole
        inside, _, answer = whole.partition("<think>\n")[2].partition("\n</think>\n")
        assert inside
        assert THOUGHT.startswith(inside)
        assert answer == f"It is {number}.{IM_END}"
        assert not any(THINK_END in stretch for stretch in trained)
        assert trained[-1].endswith(answer)
        lengths.add(len(inside))
    assert len(lengths) > 5


def test_short_reasoning_may_be_what_little_effort_asks_for(tokenizer):
    short, long = reasoned(), chat(AssistantMessage(content="4", reasoning=THOUGHT * 9))
    found = tokenize(tokenizer, [short, long], SUPER, effort_fraction=1.0, effort_tokens=60)
    hints = ["{reasoning effort: low}" in texts(tokenizer, one)[0] for one in found]
    assert hints == [True, False]
    asked = chat(AssistantMessage(content="4", reasoning="2"), effort="low")
    (one,) = tokenize(tokenizer, [asked], SUPER, strip_fraction=1.0)
    assert "{reasoning effort: low}" in texts(tokenizer, one)[0]
    with pytest.raises(DataError, match=r"chats.jsonl:1: effort = 'low'"):
        tokenize(tokenizer, [asked], NANO)


def test_shares_are_those_asked_for_and_follow_from_the_seed(tokenizer):
    rows = [reasoned(n) for n in range(400)]
    shares = {"strip_fraction": 0.3, "truncate_fraction": 0.2}

    def kinds(seed):
        found = [texts(tokenizer, one)[0] for one in tokenize(tokenizer, rows, seed=seed, **shares)]
        return ["whole" if THOUGHT in t else "strip" if "</think>It" in t else "cut" for t in found]

    first = kinds(0)
    assert 80 < first.count("strip") < 160
    assert 50 < first.count("cut") < 115
    assert kinds(0) == first
    assert kinds(1) != first


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ({"strip_fraction": -0.1}, "strip_fraction is -0.1"),
        ({"truncate_fraction": 1.1}, "truncate_fraction is 1.1"),
        ({"strip_fraction": 0.6, "effort_fraction": 0.6}, "sum to 1.2"),
    ],
)
def test_fractions_are_checked(control, said):
    with pytest.raises(ConfigError, match=said):
        ReasoningControlConfig(**control)


def test_a_vocabulary_without_the_tokens_of_chats_is_refused(tokenizer, monkeypatch):
    check_chat_tokens(tokenizer, with_tools=True)
    ids = {"<|im_start|>": 10, "<|im_end|>": 11, "<think>": 12, "</think>": 13}
    monkeypatch.setattr(Tokenizer, "token_to_id", lambda _, token: ids.get(token))
    check_chat_tokens(tokenizer, with_tools=False)
    with pytest.raises(ConfigError, match="lacks <tool_call>, </tool_call>"):
        check_chat_tokens(tokenizer, with_tools=True)
    ids.clear()
    with pytest.raises(ConfigError, match=r"lacks <\|im_start\|>"):
        check_chat_tokens(tokenizer, with_tools=False)
