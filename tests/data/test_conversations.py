"""Rows of conversations: what is read, and what is refused where."""

import gzip
import json

import pytest

from nemotron3.data.conversations import (
    ConversationsConfig,
    ConversationsReport,
    conversation_files,
    parse_conversation,
    read_conversations,
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
    marked = [*said, {"role": "assistant", "content": "6"}]
    marked[1] = marked[1] | {"train": False}
    found = parse_conversation(json.dumps({"messages": marked}), place="").messages
    assert [getattr(m, "is_trained", None) for m in found] == [None, False, None, True]


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
        ('{"prompt": "a", "completion": 3}', "messages is"),
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
    "fields", [{"path": ""}, {"weight": 0.0}, {"weight": -1.0}, {"max_bad_fraction": 1.0}]
)
def test_settings_are_checked(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        ConversationsConfig(**({"path": "a.jsonl"} | fields))
