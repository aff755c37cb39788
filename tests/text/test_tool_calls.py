"""Tool calls read out of a stream: typed, parallel, unfinished, malformed, cut anywhere."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3.text.chat import ChatTemplate
from nemotron3.text.chat_style import chat_style
from nemotron3.text.messages import AssistantMessage, Tool, ToolCall
from nemotron3.text.reasoning import split_reasoning
from nemotron3.text.tool_calls import (
    CallDelta,
    ContentDelta,
    ParsedCall,
    ToolCallParser,
    parse_tool_calls,
)
from nemotron3.text.tool_listing import write_argument

PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "on": {"type": "boolean"},
    "list": {"type": "array"},
    "map": {"type": "object"},
    "nothing": {"type": "null"},
}
TOOL = Tool(name="f", parameters={"type": "object", "properties": PROPERTIES})


def call(name="f", *, inside="", **arguments):
    written = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{inside}{written}</function>\n</tool_call>"


def parsed(text):
    content, calls = parse_tool_calls(text, [TOOL])
    assert all(call.is_complete for call in calls)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def test_arguments_are_typed_by_the_schema():
    text = call(text="5", count="5", ratio="0.5", on="True", list="[1]", map='{"a": 1}', other="7")
    values = {"text": "5", "count": 5, "ratio": 0.5, "on": True, "list": [1], "map": {"a": 1}}
    assert parsed(text) == ("", [("f", values | {"other": 7})])


def test_a_call_without_arguments():
    assert parsed(call()) == ("", [("f", {})])
    assert parse_tool_calls(call())[1] == [ParsedCall("f", "{}", is_complete=True)]


def test_parallel_calls_with_text_around():
    text = f"I will look.\n{call(count=1)}\n{call('g', x='y')}\n\nDone."
    assert parsed(text) == ("I will look.\n\nDone.", [("f", {"count": 1}), ("g", {"x": "y"})])


def test_white_space_around_calls_is_glue():
    assert parsed(f"Hi\n\n{call()}\n{call()}\n") == ("Hi", [("f", {}), ("f", {})])
    assert parsed(f"\n{call()}\n")[0] == ""
    assert parsed("no call \n")[0] == "no call \n"


def test_two_functions_in_one_block():
    one, two = call(count=1), call("g")
    text = one.removesuffix("</tool_call>") + two.removeprefix("<tool_call>\n")
    assert parsed(text) == ("", [("f", {"count": 1}), ("g", {})])


@pytest.mark.parametrize(
    "value",
    [
        "",
        "\n",
        "\n a\n\n",
        "if a < b: return '</x>'",
        "</parameter>",
        "see </parameter> and </function> and </tool_call>",
        "<tool_call>\n<function=g>",
        "<parameter=x>",
        "</parameter>\n</parameter>",
        'quotes " and \\ and \t and 東京 🙂',
    ],
)
def test_text_values_come_back_as_they_are(value):
    assert parsed(call(text=value, count=3)) == ("", [("f", {"text": value, "count": 3})])
    assert parsed(call(count=3, text=value)) == ("", [("f", {"count": 3, "text": value})])


def test_value_on_the_line_of_its_tag():
    text = "<tool_call><function=f><parameter=text>a b</parameter></function></tool_call>"
    assert parsed(text) == ("", [("f", {"text": "a b"})])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "Use <tool_call> tags.",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        '<tool_call>\n<function=f>\n{"a": 1}\n</function>\n</tool_call>',
        "<tool_call>\n<function=>\n</function>\n</tool_call>",
        f"<tool_call>\n<function={'a' * 300}>\n</function>\n</tool_call>",
        "<tool_call>\n<function=a\nb>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f>\n<parameter=a<b>\n1\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>\n<function=f",
        "<tool_call>\n<function=f>\n<para",
        "</tool_call> and </function>",
        "<function=f>\n</function>",
    ],
)
def test_malformed_calls_are_content_and_nothing_is_lost(text):
    assert parse_tool_calls(text, [TOOL]) == (text, [])
    assert parse_tool_calls(f"Hi \n{text}", [TOOL]) == (f"Hi \n{text}", [])


def test_reading_goes_on_after_a_malformed_call():
    assert parsed(f"<tool_call>\n{call(count=1)}") == ("<tool_call>", [("f", {"count": 1})])
    content, calls = parsed(f"<tool_call>{{}}</tool_call>\n{call()}")
    assert (content, calls) == ("<tool_call>{}</tool_call>", [("f", {})])


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("<tool_call>\n<function=f>\n<parameter=text>\n", '{"text": "'),
        ("<tool_call>\n<function=f>\n<parameter=text>\na\nb</para", '{"text": "a\\nb</para'),
        ("<tool_call>\n<function=f>\n<parameter=text>\na\n</parameter>\n", '{"text": "a"'),
        ("<tool_call>\n<function=f>\n<parameter=count>\n12", '{"count": "12'),
        ("<tool_call>\n<function=f>\n<parameter=count>\n12\n</parameter>", '{"count": 12'),
    ],
)
def test_unfinished_call_stays_open_so_that_nobody_runs_it(text, arguments):
    content, calls = parse_tool_calls(text, [TOOL])
    assert content == ""
    assert calls == [ParsedCall("f", arguments, is_complete=False)]
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)


@pytest.mark.parametrize("tail", ["", "\n", "\n</tool", "\n</tool_call>\n"])
def test_call_is_complete_when_its_function_is(tail):
    assert parsed("<tool_call>\n<function=f>\n</function>" + tail) == ("", [("f", {})])


OPEN = "<function=f>\n"
LOST = [
    # the text between `<tool_call>` and `</tool_call>`, both of which are special tokens
    (OPEN + "<parameter=text>\na\n<parameter=count>\n3\n</parameter>\n</function>\n",
     '{"text": "a", "count": 3}', True),
    (OPEN + "<parameter=text>\n<parameter=count>\n3\n</parameter>\n</function>\n",
     '{"text": "", "count": 3}', True),
    (OPEN + "<parameter=count>\n3\n<parameter=text>\na\n</function>\n",
     '{"count": 3, "text": "a"}', True),
    (OPEN + "<parameter=count>\n3\n</function>", '{"count": 3}', True),
    (OPEN + "<parameter=text>\na</function>", '{"text": "a"}', True),
    (OPEN + "<parameter=text>\na", '{"text": "a', False),
    (OPEN + "<parameter=text>\na\n</parameter>\n", '{"text": "a"', False),
    (OPEN + "<parameter=text>\na</function> b\n", '{"text": "a</function> b\\n', False),
    (OPEN + "<parameter=list>\n[1, 2\n", '{"list": "[1, 2\\n', False),
    (OPEN + '<parameter=list>\n["</function>', '{"list": "[\\"</function>', False),
    (OPEN + "<parameter=text>\na\n</parameter>\n<parameter=text>\nb\n</parameter>\n</function>",
     '{"text": "a", "text": "b"', False),
    (OPEN + "<parameter=text>\na\n<parameter=text>\nb\n</parameter>\n</function>",
     '{"text": "a\\n<parameter=text>\\nb"}', True),
    (OPEN + "<parameter=text>\na <parameter=count>\n3\n</parameter>\n</function>",
     '{"text": "a <parameter=count>\\n3"}', True),
    (OPEN + "<parameter=text>\na\n<parameter=what>\n3\n</parameter>\n</function>",
     '{"text": "a\\n<parameter=what>\\n3"}', True),
    (OPEN + '<parameter=list>\n["</parameter></function>", "\\"</parameter>\\\\"]\n</parameter>\n'
     "</function>", '{"list": ["</parameter></function>", "\\"</parameter>\\\\"]}', True),
]  # fmt: skip


@pytest.mark.parametrize(("inside", "arguments", "is_complete"), LOST)
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_special_token_or_a_declared_parameter_ends_a_value(
    inside, arguments, is_complete, piece
):
    parser = ToolCallParser([TOOL], tags_in_text=False)
    parser.push_tag("<tool_call>")
    for at in range(0, len(inside), piece):
        parser.push(inside[at : at + piece])
    parser.push_tag("</tool_call>")
    deltas = [*parser.push("\nafter"), *parser.finish()]
    assert parser.calls == [ParsedCall("f", arguments, is_complete=is_complete)]
    assert deltas == [ContentDelta("\nafter")]
    if not is_complete:
        with pytest.raises(json.JSONDecodeError):
            json.loads(arguments)


def test_a_call_within_a_call_cuts_the_first_off():
    parser = ToolCallParser([TOOL], tags_in_text=False)
    parser.push_tag("<tool_call>")
    parser.push("\n<function=f>\n<parameter=text>\na")
    parser.push_tag("<tool_call>")
    parser.push("\n<function=f>\n<parameter=count>\n3\n</parameter>\n</function>\n")
    parser.push_tag("</tool_call>")
    parser.push_tag("<tool_response>")
    assert parser.finish() == []
    assert parser.calls == [
        ParsedCall("f", '{"text": "a', is_complete=False),
        ParsedCall("f", '{"count": 3}', is_complete=True),
    ]


def test_name_comes_first_and_text_values_flow():
    parser = ToolCallParser([TOOL])
    assert parser.push("Hi <tool_call>\n<function=f>\n") == [ContentDelta("Hi")]
    assert parser.push("<parameter=text>\n") == [
        CallDelta(0, name="f"),
        CallDelta(0, arguments='{"text": "'),
    ]
    assert parser.push('a "b') == [CallDelta(0, arguments='a \\"b')]
    assert parser.push("\n</para") == []
    assert parser.push("meter>\n<parameter=count>\n1") == [
        CallDelta(0, arguments='"'),
        CallDelta(0, arguments=', "count": '),
    ]
    assert parser.push("2\n</parameter>\n</function>") == [
        CallDelta(0, arguments="12"),
        CallDelta(0, arguments="}"),
    ]
    assert parser.finish() == []


def test_only_the_token_opens_a_call_where_tokens_are_known():
    parser = ToolCallParser([TOOL], tags_in_text=False)
    quoted = call(count=1)
    deltas = [*parser.push(f"{quoted}\n"), *parser.push_tag("<tool_call>")]
    deltas += parser.push(quoted.removeprefix("<tool_call>")) + parser.push_tag("<tool_call>")
    deltas += [*parser.push_tag("<tool_call>"), *parser.push("\nno"), *parser.finish()]
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    assert content == f"{quoted}<tool_call><tool_call>\nno"
    assert parser.calls == [ParsedCall("f", '{"count": 1}', is_complete=True)]


def streamed(pieces, *, tags_in_text=True):
    """Content and calls as a client joins them from the deltas; tags are pieces of their own."""
    parser = ToolCallParser([TOOL], tags_in_text=tags_in_text)
    content, calls = "", []
    take = parser.push
    if not tags_in_text:
        take = lambda p: parser.push_tag(p) if p in TAGS else parser.push(p)  # noqa: E731
    for delta in [*itertools.chain(*map(take, pieces)), *parser.finish()]:
        if isinstance(delta, ContentDelta):
            content += delta.text
        elif delta.name is not None:
            assert delta.index == len(calls)
            assert delta.arguments == ""
            calls.append([delta.name, ""])
        else:
            assert delta.index == len(calls) - 1
            calls[-1][1] += delta.arguments
    assert [tuple(c) for c in calls] == [(c.name, c.arguments) for c in parser.calls]
    for read in parser.calls:
        if read.is_complete:
            assert isinstance(json.loads(read.arguments), dict)
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(read.arguments)
    return content, calls, [call.is_complete for call in parser.calls]


TAGS = ("<tool_call>", "</tool_call>", "<tool_response>")
FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "\n", "<function=f>", "<parameter=text>", "<parameter=count>", "12"),
        *("</parameter>", "</function>", "</tool_call>", "a", " ", "<", "</", "é", '"', "</para"),
        *(call(text="a"), call(count="1"), "<function=f>\n<parameter=text>\n"),
        *("\n<parameter=count>\n", "<parameter=list>\n", "[", "]", "\\", "\n</function>\n"),
    ]
)


@given(fragments=st.lists(FRAGMENTS, max_size=10), data=st.data())
def test_how_the_stream_is_cut_changes_nothing(fragments, data):
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = streamed([text])
    assert streamed(pieces) == whole
    assert streamed(list(text)) == whole


@given(fragments=st.lists(FRAGMENTS | st.sampled_from(TAGS), max_size=12), data=st.data())
def test_where_tags_are_tokens_the_cuts_change_nothing_either(fragments, data):
    fragments = [f for f in fragments if f in TAGS or not any(tag in f for tag in TAGS)]
    joined = []
    for is_tag, group in itertools.groupby(fragments, TAGS.__contains__):
        parts = list(group)
        joined += parts if is_tag else ["".join(parts)]
    pieces = []
    for text in joined:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        cuts = [] if text in TAGS else cuts
        pieces += [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = streamed(joined, tags_in_text=False)
    assert streamed(pieces, tags_in_text=False) == whole
    letters = [p for text in joined for p in ([text] if text in TAGS else text)]
    assert streamed(letters, tags_in_text=False) == whole


@given(fragments=st.lists(FRAGMENTS, max_size=10))
def test_every_complete_call_is_json_and_text_without_calls_is_untouched(fragments):
    text = "".join(fragments)
    content, calls = parse_tool_calls(text, [TOOL])
    for read in calls:
        if read.is_complete:
            assert isinstance(json.loads(read.arguments), dict)
    if not calls:
        assert content == text


LINES = st.lists(
    st.sampled_from(["a", "\n", " ", "</parameter>", "</function>", "<b>", "é", '"', "\\"]),
    max_size=6,
).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | LINES,
    lambda v: st.lists(v, max_size=2) | st.dictionaries(LINES, v, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "text": LINES,
        "count": st.integers(),
        "ratio": st.floats(allow_nan=False, allow_infinity=False),
        "on": st.booleans(),
        "list": st.lists(JSON, max_size=2),
        "map": st.dictionaries(LINES, JSON, max_size=2),
        "nothing": st.none(),
    },
)


def _is_ambiguous(value):
    """Text that ends a value in the format itself, which has no escaping."""
    joined = "".join(write_argument(value).split())
    return "</parameter></function>" in joined or joined.endswith("</parameter>")


@pytest.mark.parametrize("style", ["nano", "ultra"])
@given(
    arguments=st.lists(ARGUMENTS, min_size=1, max_size=3),
    reasoning=st.sampled_from([None, "hm", "a\n\nb"]),
    content=st.sampled_from(["", "Let me look.", "One.\n\nTwo."]),
)
def test_what_the_template_writes_is_read_back(style, arguments, reasoning, content):
    for values in arguments:
        for name in [name for name, value in values.items() if _is_ambiguous(value)]:
            del values[name]
    calls = tuple(ToolCall(name="f", arguments=values) for values in arguments)
    message = AssistantMessage(content=content, reasoning=reasoning, tool_calls=calls)
    template = ChatTemplate(chat_style(style))
    options = {"enable_thinking": reasoning is not None}
    prompt = template.render([], **options)
    whole = template.render([message], add_generation_prompt=False).text
    produced = whole.removeprefix(prompt.text).removesuffix("<|im_end|>\n")
    read_reasoning, answer = split_reasoning(produced, is_open=prompt.is_reasoning_open)
    read_content, read = parse_tool_calls(answer, [TOOL])
    assert read_reasoning == (reasoning or "")
    assert read_content == content
    assert [json.loads(call.arguments) for call in read] == arguments
    assert all(call.name == "f" and call.is_complete for call in read)
