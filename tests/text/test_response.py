"""Generated ids to reasoning, content and calls: the whole way, as a client sees it."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.text.chat import ChatTemplate
from nemotron3.text.messages import AssistantMessage, ToolCall, UserMessage, parse_tools
from nemotron3.text.response import ReasoningDelta, Response, ResponseParser
from nemotron3.text.tokenizer import Tokenizer
from nemotron3.text.tool_calls import CallDelta, ContentDelta, ParsedCall

TEMPLATE = ChatTemplate()
USER = UserMessage(content="Weather in Köln?")
TOOLS = parse_tools(
    [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}]
)
CALL = "\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the rain in Köln 🙂\n<function=f>\n"] * 3, vocab_size=330)


@pytest.fixture(scope="module")
def tagless(tokenizer, tmp_path_factory):
    """The same vocabulary with other names for the tags' ids."""
    path = tmp_path_factory.mktemp("tagless")
    tokenizer.save(path)
    file = path / "tokenizer.json"
    source = file.read_text()
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        source = source.replace(f'"{tag}"', f'"<{tag[1:-1]}s>"')
    file.write_text(source)
    return Tokenizer.from_directory(path)


def produced(tokenizer, message, *, thinks):
    """Ids that a model would have to generate to say this, as training would have it."""
    prompt = TEMPLATE.render([USER], enable_thinking=thinks)
    whole = TEMPLATE.render([USER, message], add_generation_prompt=False).tokens(tokenizer)
    return whole.ids[len(prompt.tokens(tokenizer).ids) : -1], prompt.is_reasoning_open


def read(tokenizer, pieces, *, is_open, tools=TOOLS, **options):
    parser = ResponseParser(tokenizer, is_reasoning_open=is_open, tools=tools, **options)
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    return parser, deltas


@pytest.mark.parametrize("thinks", [True, False])
@given(
    reasoning=st.sampled_from(["the rain", "say </think>\nnow <tool_call>", "a\n\n🙂"]),
    content=st.sampled_from(["", "It rains.", "Note:\n</think> closes, <tool_call> calls. 🙂"]),
    values=st.lists(st.sampled_from(["Köln", "", "<|im_end|>", "a\n</b>"]), max_size=2),
)
def test_what_was_rendered_is_read_back(tokenizer, thinks, reasoning, content, values):
    calls = tuple(ToolCall(name="f", arguments={"a": value}) for value in values)
    said = AssistantMessage(
        content=content, reasoning=reasoning if thinks else None, tool_calls=calls
    )
    ids, is_open = produced(tokenizer, said, thinks=thinks)
    parser, deltas = read(tokenizer, [[i] for i in ids], is_open=is_open)
    response = parser.response()
    assert response.reasoning == (reasoning if thinks else "")
    assert response.content == content
    assert [json.loads(c.arguments)["a"] for c in response.tool_calls] == values
    joined = {ReasoningDelta: "", ContentDelta: ""}
    for delta in deltas:
        if not isinstance(delta, CallDelta):
            joined[type(delta)] += delta.text
    assert joined == {ReasoningDelta: response.reasoning, ContentDelta: response.content}
    assert read(tokenizer, [ids], is_open=is_open)[0].response() == response


def test_reasoning_tokens_are_counted(tokenizer):
    ids, is_open = produced(
        tokenizer, AssistantMessage(content="It rains.", reasoning="the rain"), thinks=True
    )
    parser, _ = read(tokenizer, [ids], is_open=is_open)
    assert parser.num_reasoning_tokens == ids.index(tokenizer.think_end_id)
    assert read(tokenizer, [ids], is_open=False)[0].num_reasoning_tokens == 0


def test_ends_of_turns_and_unused_tokens_are_not_shown(tokenizer):
    ids = [*tokenizer.encode("It rains."), tokenizer.im_end_id, tokenizer.eos_id, 3]
    assert read(tokenizer, [ids], is_open=False)[0].response().content == "It rains."


def test_without_tools_nothing_is_a_call(tokenizer):
    text = f"<tool_call>{CALL.format('x')}</tool_call>"
    parser, _ = read(tokenizer, [tokenizer.encode(text)], is_open=False, tools=())
    assert parser.response() == Response(reasoning="", content=text, tool_calls=())


def test_quoted_call_is_content_and_the_token_calls(tokenizer):
    text = f"<tool_call>{CALL.format('x')}</tool_call>"
    quoted = tokenizer.encode(text, parse_special=False)
    assert read(tokenizer, [quoted], is_open=False)[0].response().content == text
    call = ParsedCall("f", '{"a": "x"}', is_complete=True)
    response = read(tokenizer, [tokenizer.encode(text)], is_open=False)[0].response()
    assert response == Response(reasoning="", content="", tool_calls=(call,))


def test_call_inside_the_reasoning_is_a_call(tokenizer):
    ids = tokenizer.encode(f"Look.\n<tool_call>{CALL.format('x')}</tool_call>")
    response = read(tokenizer, [[i] for i in ids], is_open=True)[0].response()
    assert (response.reasoning, response.content) == ("Look.", "")
    assert response.tool_calls == (ParsedCall("f", '{"a": "x"}', is_complete=True),)


def test_swapped_answer_is_reasoning_no_more(tokenizer):
    ids = tokenizer.encode("the rain")
    parser, deltas = read(tokenizer, [ids], is_open=True, force_nonempty_content=True)
    assert parser.response() == Response(reasoning="", content="the rain", tool_calls=())
    assert deltas[-1] == ContentDelta("the rain")


def test_vocabulary_without_tags_is_read_by_characters(tagless):
    assert tagless.token_to_id("</think>") is None
    text = f"Look.\n</think>\nOk.\n<tool_call>{CALL.format('x')}</tool_call>"
    ids = tagless.encode(text)
    response = read(tagless, [[i] for i in ids], is_open=True)[0].response()
    assert (response.reasoning, response.content) == ("Look.", "Ok.")
    assert response.tool_calls == (ParsedCall("f", '{"a": "x"}', is_complete=True),)
    assert TEMPLATE.render([USER]).tokens(tagless).ids != []


def joined(deltas):
    """What deltas say, however it is divided."""
    texts = {ReasoningDelta: "", ContentDelta: ""}
    calls: dict[int, list] = {}
    for delta in deltas:
        if isinstance(delta, CallDelta):
            call = calls.setdefault(delta.index, [[], ""])
            call[0] += [] if delta.name is None else [delta.name]
            call[1] += delta.arguments
        else:
            texts[type(delta)] += delta.text
    return texts, calls


TEXTS = ["the rain", " ", "\n", "x", "<function=f>\n", "<parameter=a>\n", "🙂", "</parameter>\n",
         "</function>\n", CALL.format("b"), "</think>", "<tool_call>"]  # fmt: skip
TAG_NAMES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<|im_end|>"]


@pytest.mark.parametrize("has_tags", [True, False])
@settings(max_examples=300)
@given(
    pieces=st.lists(
        st.one_of(
            st.sampled_from(TEXTS).map(lambda text: ("text", text)),
            st.sampled_from(TAG_NAMES).map(lambda name: ("tag", name)),
            st.integers(0, 255).map(lambda byte: ("byte", byte)),
        ),
        max_size=24,
    ),
    cuts=st.sets(st.integers(0, 60)),
    is_open=st.booleans(),
    tools=st.sampled_from([(), TOOLS]),
    options=st.fixed_dictionaries(
        {"keep_whitespace": st.booleans(), "force_nonempty_content": st.booleans()}
    ),
)
def test_how_ids_are_divided_among_pushes_changes_nothing(
    tokenizer, tagless, has_tags, pieces, cuts, is_open, tools, options
):
    vocabulary = tokenizer if has_tags else tagless
    ids = []
    for kind, value in pieces:
        if kind == "byte":
            ids.append(32 + value)
        else:
            ids += vocabulary.encode(value, parse_special=kind == "tag")
    ends = sorted(cut for cut in cuts if cut < len(ids))
    divisions = [
        [[i] for i in ids],
        [ids],
        [ids[start:end] for start, end in pairwise([0, *ends, len(ids)])],
    ]
    found = []
    for division in divisions:
        parser, deltas = read(vocabulary, division, is_open=is_open, tools=tools, **options)
        counts = parser.num_ids, parser.num_reasoning_tokens, parser.content_places
        found.append((parser.response(), counts, joined(deltas)))
    assert found[0][1][0] == len(ids)
    assert found[0] == found[1] == found[2]


def test_half_a_character_before_a_tag_is_marked(tokenizer):
    smile = [32 + byte for byte in "🙂".encode()]
    response = read(tokenizer, [smile[:2], [tokenizer.think_end_id], smile], is_open=True)[0]
    assert response.response() == Response(reasoning="\ufffd", content="🙂", tool_calls=())
