"""The reasoning budget: forced tokens, unchanged answers, and the parsing of ids."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import ConfigError
from nemotron3.inference.sampling.thinking_budget import (
    CALL_OPENING,
    BudgetIds,
    ThinkingBudget,
    budget_ids,
)
from nemotron3.text.chat_style import CHAT_STYLES, ChatStyle
from nemotron3.text.messages import parse_tools
from nemotron3.text.response import ResponseParser
from nemotron3.text.tokenizer import Tokenizer

START, END, CALL, LINE, DOT_LINE, BLANK, WORD, FUNCTION, STOP = range(9)
BYTES = {LINE: b"\n", DOT_LINE: b".\n", BLANK: b" ", WORD: b"so", FUNCTION: b"<function=f"}
NANO = BudgetIds(
    start=START,
    closing=(LINE, END),
    line_ends=frozenset({LINE, DOT_LINE}),
    hidden=frozenset({STOP}),
    call_start=CALL,
    token_bytes=lambda token: BYTES.get(token, b"<special>"),
)
ULTRA = replace(NANO, closing=(END,))
PHRASE = replace(NANO, closing=(WORD, BLANK, LINE, END))
STYLES = [NANO, ULTRA, PHRASE]


def budget(limit, grace=0, *, ids=NANO, is_open=True, **how):
    return ThinkingBudget(budget=limit, grace=grace, ids=ids, is_open=is_open, **how)


def run(machine, wanted):
    """The output of a model that wants these tokens; a forced token does not use one up."""
    tokens, forced = [], []
    wishes = iter(wanted)
    while True:
        token = machine.forced()
        forced.append(token is not None)
        if token is None:
            token = next(wishes, None)
        if token is None:
            return tokens, forced[:-1]
        tokens.append(token)
        machine.accept(token)


@pytest.mark.parametrize(
    ("machine", "wanted", "expected"),
    [
        pytest.param(budget(0), [WORD], [END, WORD], id="none at all"),
        pytest.param(budget(0, 5), [WORD], [END, WORD], id="none, whatever the grace"),
        pytest.param(budget(0, last_token=WORD), [WORD], [LINE, END, WORD], id="none, in mid-line"),
        pytest.param(budget(0, last_token=START), [WORD], [END, WORD], id="none, after the tag"),
        pytest.param(budget(1), [WORD, WORD], [WORD, LINE, END, WORD], id="one"),
        pytest.param(budget(1), [LINE, WORD], [LINE, END, WORD], id="one, a line end"),
        pytest.param(budget(1), [DOT_LINE, WORD], [DOT_LINE, END, WORD], id="ends with a line end"),
        pytest.param(
            budget(2, 9), [WORD] * 3 + [LINE, WORD], [WORD] * 3 + [LINE, END, WORD], id="grace used"
        ),
        pytest.param(budget(2, 2), [WORD] * 5, [WORD] * 4 + [LINE, END, WORD], id="grace spent"),
        pytest.param(budget(2, 9), [WORD, LINE] * 2, [WORD, LINE, END, WORD, LINE], id="at once"),
        pytest.param(budget(2), [WORD, END, WORD], [WORD, END, WORD], id="closed in time"),
        pytest.param(budget(2, 3), [WORD] * 3 + [END], [WORD] * 3 + [END], id="closed in grace"),
        pytest.param(budget(10**9), [WORD] * 50, [WORD] * 50, id="larger than the context"),
        pytest.param(budget(0, is_open=False), [WORD] * 9, [WORD] * 9, id="never thinks"),
        pytest.param(
            budget(1, is_open=False),
            [START, WORD, WORD],
            [START, WORD, LINE, END, WORD],
            id="opens by itself",
        ),
        pytest.param(
            budget(2),
            [WORD, END, LINE, START, WORD, WORD],
            [WORD, END, LINE, START, WORD, LINE, END, WORD],
            id="opened again: the rest of the budget",
        ),
        pytest.param(
            budget(1),
            [WORD, START, WORD],
            [WORD, LINE, END, START, END, WORD],
            id="opened again: nothing left",
        ),
        pytest.param(
            budget(1, is_open=False), [WORD, START, WORD] * 2, [WORD, START, WORD] * 2, id="in text"
        ),
        pytest.param(budget(3), [WORD, STOP], [WORD, STOP], id="ended while open"),
        pytest.param(budget(2, ids=ULTRA), [WORD] * 3, [WORD, WORD, END, WORD], id="tag alone"),
        pytest.param(
            budget(1, ids=PHRASE), [DOT_LINE], [DOT_LINE, WORD, BLANK, LINE, END], id="a phrase"
        ),
        pytest.param(
            budget(2, ids=PHRASE), [LINE, WORD], [LINE, WORD, BLANK, LINE, END], id="begun, one"
        ),
        pytest.param(
            budget(3, ids=PHRASE), [WORD, WORD, BLANK], [WORD, WORD, BLANK, LINE, END], id="begun"
        ),
        pytest.param(
            budget(2, has_tools=True),
            [WORD, CALL, LINE, FUNCTION, WORD, START, WORD],
            [WORD, CALL, LINE, FUNCTION, WORD, START, WORD],
            id="a call is not cut",
        ),
        pytest.param(
            budget(2, has_tools=True),
            [WORD, CALL, WORD, WORD],
            [WORD, CALL, WORD, LINE, END, WORD],
            id="no call after all",
        ),
        pytest.param(
            budget(2), [WORD, CALL, FUNCTION], [WORD, CALL, LINE, END, FUNCTION], id="no tools"
        ),
        pytest.param(
            budget(2, has_tools=True),
            [WORD, CALL] + [BLANK] * 9,
            [WORD, CALL] + [BLANK] * CALL_OPENING + [LINE, END] + [BLANK] * (9 - CALL_OPENING),
            id="a call that does not come",
        ),
        pytest.param(
            budget(2, has_tools=True),
            [CALL] * 5,
            [CALL] * 3 + [LINE, END] + [CALL] * 2,
            id="calls that do not come",
        ),
    ],
)
def test_what_comes(machine, wanted, expected):
    assert run(machine, wanted)[0] == expected


machines = st.builds(
    lambda limit, grace, ids, is_open, has_tools: (limit, grace, ids, is_open, has_tools),
    st.integers(0, 12),
    st.integers(0, 6),
    st.sampled_from(STYLES),
    st.booleans(),
    st.booleans(),
)
streams = st.lists(st.integers(0, STOP), max_size=60) | st.lists(
    st.sampled_from([WORD, BLANK, CALL, START]), max_size=60
)


@given(machines, streams)
def test_the_bound_holds_and_the_closing_is_whole(how, wanted):
    limit, grace, ids, is_open, has_tools = how
    machine = budget(limit, grace, ids=ids, is_open=is_open, has_tools=has_tools)
    tokens, forced = run(machine, wanted)
    lead = ids.closing[:-1]
    calls = CALL_OPENING if has_tools else 0
    assert machine.num_reasoning_tokens <= limit + grace + calls
    for i, token in enumerate(tokens):
        if not forced[i]:
            continue
        # Up to the tag nothing but the closing sequence; before the tag the whole of it.
        end = tokens.index(END, i)
        assert all(forced[i : end + 1])
        if i == 0 or not forced[i - 1]:
            assert tuple(tokens[i : end + 1]) == ids.closing[len(ids.closing) - (end + 1 - i) :]
        before = tuple(tokens[max(0, end - len(lead)) : end])
        at_line_end = end == 0 or tokens[end - 1] in (*ids.line_ends, START)
        assert before == lead or (set(lead) <= ids.line_ends and at_line_end)
        assert token in ids.closing


@given(machines, streams)
def test_shorter_reasoning_is_untouched(how, wanted):
    _, grace, ids, is_open, has_tools = how
    free = budget(10**9, ids=ids, is_open=is_open, has_tools=has_tools)
    assert run(free, wanted) == (wanted, [False] * len(wanted))
    enough = free.num_reasoning_tokens + 1
    held = budget(enough, grace, ids=ids, is_open=is_open, has_tools=has_tools)
    assert run(held, wanted)[0] == wanted


@given(machines, streams, st.data())
def test_a_fork_goes_its_own_way_and_the_same_way(how, wanted, data):
    limit, grace, ids, is_open, has_tools = how
    machine = budget(limit, grace, ids=ids, is_open=is_open, has_tools=has_tools)
    cut = data.draw(st.integers(0, len(wanted)))
    run(machine, wanted[:cut])
    fork = machine.fork()
    expected = run(fork, wanted[cut:])
    assert run(machine, wanted[cut:]) == expected


@given(machines, streams)
def test_what_is_forced_goes_on_to_the_closing_tag(how, wanted):
    limit, grace, ids, is_open, has_tools = how
    machine = budget(limit, grace, ids=ids, is_open=is_open, has_tools=has_tools)
    for wish in wanted:
        closing = []
        while (token := machine.forced()) is not None:
            closing.append(token)
            machine.accept(token)
        if closing:
            assert closing == list(ids.closing[-len(closing) :])
            assert closing[-1] == END
        machine.accept(wish)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["so.\n\n the rain in Köln 🙂\n<function=f>\n"] * 5, vocab_size=340)


PIECES = ["so", ".\n", "\n", " ", "  \n", "Köln", "🙂", "<function=f>", "<func", "\u00a0", "tion="]
TAGS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</s>",
    "<|im_end|>",
]
TOOLS = parse_tools([{"name": "f", "parameters": {"type": "object"}}])


@settings(max_examples=300)
@given(
    pieces=st.lists(st.sampled_from(PIECES + TAGS) | st.just("</think>"), max_size=12),
    is_open=st.booleans(),
    has_tools=st.booleans(),
)
def test_it_reads_a_stream_as_the_response_parser_does(tokenizer, pieces, is_open, has_tools):
    ids = budget_ids(tokenizer, CHAT_STYLES["nano"])
    machine = budget(10**9, ids=ids, is_open=is_open, has_tools=has_tools)
    parser = ResponseParser(tokenizer, is_reasoning_open=is_open, tools=TOOLS if has_tools else ())
    after_call = None
    for token in (token for piece in pieces for token in tokenizer.encode(piece)):
        machine.accept(token)
        parser.push([token])
        after_call = 0 if token == tokenizer.tool_call_start_id else after_call
        assert machine.is_open == parser._splitter.is_reasoning_open
        assert parser.num_reasoning_tokens <= machine.num_reasoning_tokens
        if after_call is not None:
            after_call += 1
            if after_call > CALL_OPENING:
                return  # the parser has all the time in the world


@pytest.mark.parametrize(
    ("name", "lead"), [("nano", "\n"), ("super", "\n"), ("ultra", ""), ("lightning", "")]
)
def test_ids_of_a_style(tokenizer, name, lead):
    ids = budget_ids(tokenizer, CHAT_STYLES[name])
    assert ids.closing == (*tokenizer.encode(lead), tokenizer.think_end_id)
    assert ids.start == tokenizer.think_start_id
    assert ids.call_start == tokenizer.tool_call_start_id
    for text in ("\n", ".\n", " \n\n"):
        assert tokenizer.encode(text)[-1] in ids.line_ends
    for text in ("so", " ", "<think>", "<|im_end|>"):
        assert tokenizer.encode(text)[-1] not in ids.line_ends
    for text in ("</s>", "<|im_end|>", "<unk>"):
        assert tokenizer.encode(text)[0] in ids.hidden
    for text in ("so", " ", "<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert tokenizer.encode(text)[0] not in ids.hidden


def test_a_style_that_closes_nothing_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match="does not close the reasoning"):
        budget_ids(tokenizer, ChatStyle(name="mine", reasoning_end="\n\n"))
