"""Rows of conversations: what is read, and what is refused where."""

import gzip
import json
import math

import pytest

from nemotron3.data.conversations import (
    ConversationsConfig,
    ConversationsReport,
    conversation_files,
    parse_conversation,
    read_conversations,
    with_different_titles,
)
from nemotron3.errors import ConfigError, DataError
from nemotron3.text.messages import AssistantMessage, UserMessage

CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ConversationsConfig(path=str(path))


def test_a_prompt_with_its_completion_is_a_conversation():
    expected = (UserMessage(content="2+2?"), AssistantMessage(content="4"))
    line = json.dumps({"prompt": "2+2?", "completion": "4"})
    assert parse_conversation(line, place="").messages == expected
    as_lists = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    assert parse_conversation(json.dumps(as_lists), place="").messages == expected
    assert parse_conversation(json.dumps(CHAT), place="").messages == expected


def test_answers_before_the_completion_and_those_marked_are_context():
    said = [*CHAT["messages"], {"role": "user", "content": "3+3?"}]
    line = json.dumps({"prompt": said, "completion": "6"})
    trained = [getattr(m, "is_trained", None) for m in parse_conversation(line, place="").messages]
    assert trained == [None, False, None, True]
    for mark in ({"train": False}, {"weight": 0}, {"weight": 0.0, "train": None}):
        marked = [*said, {"role": "assistant", "content": "6", "weight": 1, "train": True}]
        marked[1] = marked[1] | mark
        found = parse_conversation(json.dumps({"messages": marked}), place="").messages
        assert [getattr(m, "is_trained", None) for m in found] == [None, False, None, True]


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("stored", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_may_be_json_text(stored):
    (tool,) = parse_conversation(json.dumps(CHAT | {"tools": stored}), place="").tools
    assert (tool.name, tool.parameters) == ("add", {"type": "object"})


@pytest.mark.parametrize("stored", [None, [], "", "null", "[]"])
def test_tools_may_be_none(stored):
    assert parse_conversation(json.dumps(CHAT | {"tools": stored}), place="").tools == ()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "not JSON"),
        ("[]", "list; a JSON object"),
        ('{"text": "a"}', "has text; it needs messages, or prompt and completion"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        (
            '{"messages": [{"role": "assistant", "content": "a", "train": false}]}',
            "no message of the assistant",
        ),
        ('{"messages": [{"role": "robot", "content": "a"}]}', r"messages\[0\].role"),
        ('{"messages": 3}', "messages is"),
        ('{"prompt": "a", "completion": 3}', "completion is 3; a text"),
        ('{"prompt": "a", "completion": NaN}', "completion is NaN; a text"),
        ('{"prompt": null, "completion": "b"}', "prompt is null; a text"),
        ('{"prompt": "a", "completion": [{"role": "x"}]}', r"completion\[0\].role is 'x'"),
        ('{"prompt": "a", "completion": "b", "tools": "add"}', "tools is a text and not JSON"),
        ('{"prompt": "a", "completion": "b", "tools": "3"}', "tools is of type int"),
        ('{"prompt": "a", "completion": "b", "tools": ["{"]}', r"tools\[0\] is a text and not"),
        ("[" * 100_000, "nested too deep"),
        ('{"prompt": "a", "completion": "b", "tools": "' + "[" * 100_000 + '"}', "too deep"),
        ('{"messages": [{"role": "assistant", "train": "no"}]}', "train is 'no'; it must be true"),
        ('{"messages": [{"role": "assistant", "train": 0}]}', "train is 0; it must be true"),
        (
            '{"messages": [{"role": "user", "content": "", "train": 0}]}',
            r"messages\[0\].train is 0",
        ),
        ('{"messages": [{"role": "assistant", "weight": 0.5}]}', "weight is 0.5; it must be 0"),
        ('{"messages": [{"role": "assistant", "weight": "0"}]}', "weight is '0'; it must be 0"),
        (
            '{"messages": [{"role": "assistant", "weight": 0, "train": true}]}',
            "weight is 0 and train is True",
        ),
        ('{"prompt": "a", "completion": "b", "effort": 3}', "effort is 3"),
    ],
)
def test_what_cannot_be_trained_on_is_named_with_its_place(row, said):
    with pytest.raises(DataError, match=rf"^chats.jsonl:7: .*{said}"):
        parse_conversation(row, place="chats.jsonl:7")


def test_folders_and_compressed_files_are_read_in_order(tmp_path):
    write(tmp_path / "b.jsonl", CHAT)
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps(CHAT) + "\n\n" + json.dumps(CHAT) + "\n")
    (tmp_path / "notes.txt").write_text("no conversation")
    config = ConversationsConfig(path=str(tmp_path))
    assert [file.name for file in conversation_files(config)] == ["a.jsonl.gz", "b.jsonl"]
    places = [found.place.rpartition("/")[2] for found in read_conversations(config)]
    assert places == ["a.jsonl.gz:1", "a.jsonl.gz:3", "b.jsonl:1"]


def test_bad_rows_are_an_error_unless_their_share_is_allowed(tmp_path):
    file = tmp_path / "chats.jsonl"
    write(file, CHAT, {"text": "a"}, CHAT, CHAT)
    with pytest.raises(DataError, match=r"chats.jsonl:2: the row has text"):
        list(read_conversations(ConversationsConfig(path=str(file))))
    report = ConversationsReport()
    allowed = ConversationsConfig(path=str(file), max_bad_fraction=0.25)
    assert len(list(read_conversations(allowed, report))) == 3
    assert report.rows == 4
    assert report.bad.total() == 1
    with pytest.raises(DataError, match=r"1 of 4 rows .* more than .*0.2; the first: .*:2"):
        list(read_conversations(ConversationsConfig(path=str(file), max_bad_fraction=0.2)))


def test_rows_that_a_check_refuses_count_as_unusable(tmp_path):
    config = write(tmp_path / "chats.jsonl", *[CHAT | {"effort": str(n)} for n in range(4)])

    def check(conversation):
        if conversation.effort == "1":
            raise ConfigError("is 1", field="effort")
        if conversation.effort == "3":
            raise RecursionError

    with pytest.raises(DataError, match=r"chats.jsonl:2: effort is 1"):
        list(read_conversations(config, check=check))
    report = ConversationsReport()
    allowed = ConversationsConfig(path=config.path, max_bad_fraction=0.5)
    assert [c.effort for c in read_conversations(allowed, report, check=check)] == ["0", "2"]
    assert report.bad == {"effort is 1": 1, "the row is nested too deep; write it flatter": 1}


def test_sources_without_rows_are_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        list(read_conversations(ConversationsConfig(path=str(tmp_path / "empty.jsonl"))))
    with pytest.raises(DataError, match="does not exist"):
        list(read_conversations(ConversationsConfig(path=str(tmp_path / "none.jsonl"))))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no file that ends in"):
        list(read_conversations(ConversationsConfig(path=str(tmp_path / "folder"))))


@pytest.mark.parametrize(
    "fields",
    [
        *({"path": ""}, {"name": "all"}, {"name": "a\nb"}, {"name": " "}),
        *({"weight": value} for value in (0.0, -1.0, math.inf, math.nan)),
        *({"max_bad_fraction": value} for value in (1.0, -0.1, math.nan)),
    ],
)
def test_settings_are_checked(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ConversationsConfig(**({"path": "a.jsonl"} | fields))


@pytest.mark.parametrize(
    ("paths", "titles"),
    [
        (["a/chats.jsonl", "b/code.jsonl"], ["chats", "code"]),
        (["a/chats.jsonl", "b/chats.jsonl"], ["a-chats", "b-chats"]),
        (["chats.v1.jsonl", "chats.v2.jsonl.gz"], ["chats.v1", "chats.v2"]),
        (["x/a/c.jsonl", "x/b/c.json", "y/a/c.jsonl"], ["x-a-c", "b-c", "y-a-c"]),
        (["b-chats.jsonl", "a/chats.jsonl", "b/chats.jsonl"], ["/b-chats", "a-chats", "/b-chats"]),
        (["d/all.jsonl"], ["d-all"]),
        (["d/.jsonl", "e/.jsonl"], ["d-", "e-"]),
        (["a\nb.jsonl"], ["a_b"]),
    ],
)
def test_sources_of_one_name_are_named_by_their_folders(paths, titles):
    found = [s.title for s in with_different_titles([ConversationsConfig(path=p) for p in paths])]
    assert len(set(found)) == len(paths)
    for title, wanted in zip(found, titles, strict=True):
        assert title.endswith(wanted[1:]) if wanted[0] == "/" else title == wanted


def test_a_source_that_is_given_twice_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["chats.jsonl", str(tmp_path / "chats.jsonl")]
    with pytest.raises(ConfigError, match="is given twice; give it once, with a weight of 2"):
        with_different_titles([ConversationsConfig(path=path) for path in paths])
