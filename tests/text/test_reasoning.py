"""Reasoning told from answer; the complaints about leaks are each a test, named for what holds."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.text.reasoning import ReasoningSplitter, Span, partial_suffix, split_reasoning


def spans_of(pieces, **options):
    """Joined spans of pieces; a piece that is a tag in a tuple is the special token."""
    splitter = ReasoningSplitter(**options)
    spans = []
    for piece in pieces:
        spans += splitter.push_tag(*piece) if isinstance(piece, tuple) else splitter.push(piece)
    spans += splitter.finish()
    joined = []
    for span in spans:
        last = joined[-1] if joined else None
        if last and last.is_reasoning == span.is_reasoning and last.is_tag == span.is_tag:
            joined[-1] = Span(last.text + span.text, span.is_reasoning, span.is_tag)
        else:
            joined.append(span)
    return [
        (("reason" if s.is_reasoning else "tag" if s.is_tag else "answer"), s.text) for s in joined
    ]


def test_text_before_the_close_is_reasoning_when_the_prompt_opened_it():
    assert split_reasoning("2+2\n</think>\nFour.", is_open=True) == ("2+2", "Four.")


def test_thinking_off_gives_all_as_content():
    text = " Four.\n\n</think> closes a block."
    assert split_reasoning(text, is_open=False) == ("", text)


def test_reasoning_that_never_closes_leaves_the_content_empty():
    assert split_reasoning("2+2 is hard", is_open=True) == ("2+2 is hard", "")


# inference.md 4, number 4: empty content, everything in the reasoning.
@pytest.mark.parametrize("text", ["2+2 is hard", "2+2 is hard\n</think>\n", "2+2 is hard</think>"])
def test_content_is_never_empty_where_that_is_asked_for(text):
    split = split_reasoning(text, is_open=True, force_nonempty_content=True)
    assert split == ("", "2+2 is hard")
    pieces = [text.removesuffix("</think>")]
    streamed = spans_of(pieces, is_open=True, tags_in_text=True, force_nonempty_content=True)
    assert streamed == [("reason", "2+2 is hard"), ("answer", "2+2 is hard")]


def test_nothing_is_swapped_where_there_is_an_answer_or_nothing_at_all():
    forced = {"is_open": True, "force_nonempty_content": True}
    assert split_reasoning("a</think>b", **forced) == ("a", "b")
    assert split_reasoning("</think>", **forced) == ("", "")


# Number 21: reasoning leaks into content.
def test_opening_tag_repeated_by_the_model_is_not_shown():
    assert split_reasoning("<think>\n2+2</think>4", is_open=True) == ("2+2", "4")


def test_block_that_the_model_opens_itself_is_reasoning():
    assert split_reasoning("<think>\n2+2\n</think>\n4", is_open=False) == ("2+2", "4")
    assert split_reasoning("\n<think>2+2", is_open=False) == ("2+2", "\n")


def test_second_block_before_any_answer_is_reasoning_too():
    text = "2+2\n</think>\n<think>\nis 4\n</think>\n</think>\nFour."
    assert split_reasoning(text, is_open=True) == ("2+2\nis 4", "Four.")


def test_tags_inside_an_answer_are_text():
    answer = "<think> opens, </think> closes."
    assert split_reasoning(f"hm</think>Note: {answer}", is_open=True) == ("hm", f"Note: {answer}")
    tokens = ["hm", ("</think>",), "Note: ", ("<think>",), " and ", ("</think>",)]
    spans = spans_of(tokens, is_open=True)
    assert spans == [("reason", "hm"), ("answer", "Note: <think> and </think>")]


def test_characters_of_a_tag_do_not_close_where_the_token_is_known():
    spans = spans_of(["say </think> now", ("</think>",), "ok"], is_open=True)
    assert spans == [("reason", "say </think> now"), ("answer", "ok")]


# Number 21: tool calls inside of think.
CALL = "\n<function=f>\n</function>\n</tool_call>"


def test_call_without_a_close_ends_the_reasoning_where_tools_are_offered():
    tokens = ["Let me look.\n", ("<tool_call>",), *CALL]
    assert spans_of(tokens, is_open=True, has_tools=True) == [
        ("reason", "Let me look."),
        ("tag", "<tool_call>"),
        ("answer", CALL),
    ]
    spans = spans_of(["Look.\n<tool_call>" + CALL], is_open=True, has_tools=True, tags_in_text=True)
    assert [kind for kind, _ in spans] == ["reason", "tag", "answer"]


def test_call_in_the_reasoning_is_reasoning_where_no_tools_are_offered():
    spans = spans_of(["Look.", ("<tool_call>",), CALL], is_open=True)
    assert spans == [("reason", "Look.<tool_call>" + CALL)]


@pytest.mark.parametrize("after", [" is the tag", "<functional", "", "\n"])
def test_tag_that_is_only_mentioned_does_not_end_the_reasoning(after):
    tokens = ["I know", ("<tool_call>",), *after]
    spans = spans_of(tokens, is_open=True, has_tools=True)
    assert spans == [("reason", "I know<tool_call>" + after.rstrip())]


def test_close_right_after_a_mentioned_tag_still_closes():
    tokens = ["I know", ("<tool_call>",), "\n", ("</think>",), "ok"]
    spans = spans_of(tokens, is_open=True, has_tools=True)
    assert spans == [("reason", "I know<tool_call>"), ("answer", "ok")]


def test_a_call_counts_as_an_answer():
    tokens = ["hm", ("</think>",), ("<tool_call>",), CALL]
    spans = spans_of(tokens, is_open=True, has_tools=True, force_nonempty_content=True)
    assert [kind for kind, _ in spans] == ["reason", "tag", "answer"]


def test_close_inside_a_longer_piece():
    splitter = ReasoningSplitter(is_open=True, tags_in_text=True)
    spans = splitter.push("is 4.</think>Four")
    assert spans == [Span("is 4.", is_reasoning=True), Span("Four", is_reasoning=False)]
    assert not splitter.is_reasoning_open


def test_what_may_become_a_tag_waits():
    splitter = ReasoningSplitter(is_open=True, tags_in_text=True)
    assert splitter.push("4 </thi") == [Span("4", is_reasoning=True)]
    assert splitter.push("s") == [Span(" </this", is_reasoning=True)]


def test_white_space_around_the_sections_is_glue():
    text = "\n\n a \n b \n\n</think>\n\n  Four. \n"
    assert split_reasoning(text, is_open=True) == ("a \n b", "Four. \n")
    kept = split_reasoning(text, is_open=True, keep_whitespace=True)
    assert kept == ("\n\n a \n b \n\n", "\n\n  Four. \n")


FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "\n", " ", "a", "b c", "<", "</", "<function="),
        *("</thin", "<tool", "<function=f>\n", "\n\n", "x\n"),
    ]
)
OPTIONS = st.fixed_dictionaries(
    {
        name: st.booleans()
        for name in ("is_open", "has_tools", "keep_whitespace", "force_nonempty_content")
    }
)


@given(fragments=st.lists(FRAGMENTS, max_size=8), options=OPTIONS, data=st.data())
def test_how_the_stream_is_cut_changes_nothing(fragments, options, data):
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = spans_of([text], tags_in_text=True, **options)
    assert spans_of(pieces, tags_in_text=True, **options) == whole
    assert spans_of(list(text), tags_in_text=True, **options) == whole


@given(fragments=st.lists(FRAGMENTS, max_size=8), options=OPTIONS)
def test_nothing_but_tags_and_glue_is_lost(fragments, options):
    options = options | {"force_nonempty_content": False}
    text = "".join(fragments)
    shown = "".join(part for _, part in spans_of([text], tags_in_text=True, **options))

    def bare(said):
        for tag in ("<think>", "</think>"):
            said = said.replace(tag, "")
        return "".join(said.split())

    assert bare(shown) == bare(text)


def test_partial_suffix():
    assert partial_suffix("ab</thi", ["</think>", "<tool_call>"]) == 5
    assert partial_suffix("ab<", ["</think>", "<tool_call>"]) == 1
    assert partial_suffix("</think>", ["</think>"]) == 0
