"""Conversations to train on, one JSON object per line: messages, or a prompt and its completion.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"messages": [...], "tools": [...], "effort": "low"}
    {"prompt": "2+2?", "completion": "4"}

`messages` and `tools` have OpenAI's format, with the reasoning of an answer in `reasoning_content`;
an assistant message with `"train": false` is context only. `prompt` and `completion` are strings or
lists of messages. Other columns are ignored.

A row that cannot be used is an error that names its file, line and reason. `max_bad_fraction`
allows a share of such rows; they are skipped and counted.
"""

import gzip
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from nemotron3.errors import ConfigError, DataError
from nemotron3.text.messages import (
    AssistantMessage,
    Message,
    Tool,
    UserMessage,
    parse_messages,
    parse_tools,
)

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz")


@dataclass(frozen=True, kw_only=True)
class ConversationsConfig:
    """A source of conversations."""

    path: str
    """A file of JSON lines, or a folder of such files."""
    name: str = ""
    """Name of the source in logs; if empty, the last part of the path."""
    weight: float = 1.0
    """How often an epoch contains each of its conversations: 2 for twice, 0.5 for half of them."""
    max_bad_fraction: float = 0.0
    """Largest share of rows that may be unusable; they are skipped and counted."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("is empty; name a file of JSON lines", field="data.path")
        if not self.weight > 0:
            raise ConfigError(f"is {self.weight}; it must be above 0", field="data.weight")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(
                f"is {self.max_bad_fraction}; it must be at least 0 and below 1",
                field="data.max_bad_fraction",
            )

    @property
    def title(self) -> str:
        """The source's name."""
        return self.name or Path(self.path).name.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One row."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    effort: str | None = None
    """Reasoning effort that the user asks for, one that the chat template supports."""
    place: str = ""
    """File and line, for messages."""


@dataclass(kw_only=True)
class ConversationsReport:
    """Counts of unusable rows, updated while conversations are read."""

    rows: int = 0
    bad: Counter[str] = field(default_factory=Counter[str])
    """Rows that could not be used, by reason."""


def read_conversations(
    config: ConversationsConfig, report: ConversationsReport | None = None
) -> Iterator[Conversation]:
    """The conversations of a source in the order of its files and lines."""
    report = ConversationsReport() if report is None else report
    first_bad: DataError | None = None
    for file in conversation_files(config):
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            report.rows += 1
            try:
                yield parse_conversation(line, place=f"{file}:{number}")
            except DataError as error:
                first_bad = first_bad or error
                report.bad[_reason(error)] += 1
                if not config.max_bad_fraction:
                    raise
    if report.rows == 0:
        raise DataError(f"{config.path} has no rows; give a file of JSON lines with `messages`")
    if first_bad is not None and report.bad.total() > config.max_bad_fraction * report.rows:
        raise DataError(
            f"{report.bad.total()} of {report.rows} rows of {config.path} cannot be used, more "
            f"than data.max_bad_fraction {config.max_bad_fraction}; the first: {first_bad}"
        )


def conversation_files(config: ConversationsConfig) -> list[Path]:
    """The files of a source, sorted."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES))
        if not files:
            raise DataError(f"{path} has no file that ends in {', '.join(_SUFFIXES)}")
        return files
    if not path.is_file():
        raise DataError(f"{path} does not exist; name a file of JSON lines, or a folder of them")
    return [path]


def parse_conversation(line: str | bytes, *, place: str) -> Conversation:
    """Parse one row. Raises DataError, with `place` and the reason, if it is invalid."""
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: the row is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: the row is {type(row).__name__}; a JSON object was expected")
    fields = cast(Mapping[str, Any], row)
    try:
        messages = _messages(fields)
        tools = parse_tools(fields.get("tools"))
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    effort = fields.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise DataError(f"{place}: effort is {effort!r}; it must be a string")
    if not any(isinstance(m, AssistantMessage) and m.is_trained for m in messages):
        raise DataError(
            f"{place}: no message of the assistant can be trained; add one, or drop the row"
        )
    return Conversation(messages=messages, tools=tools, effort=effort, place=place)


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in row:
        given = row["messages"]
        parsed = parse_messages(given)
        return tuple(
            replace(message, is_trained=False)
            if isinstance(message, AssistantMessage)
            and isinstance(raw, Mapping)
            and cast(Mapping[str, Any], raw).get("train") is False
            else message
            for message, raw in zip(parsed, given, strict=True)
        )
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        before = (
            (UserMessage(content=prompt),) if isinstance(prompt, str) else parse_messages(prompt)
        )
        after = (
            (AssistantMessage(content=completion),)
            if isinstance(completion, str)
            else parse_messages(completion)
        )
        context = (
            replace(message, is_trained=False) if isinstance(message, AssistantMessage) else message
            for message in before
        )
        return (*context, *after)
    raise DataError(
        f"the row has {', '.join(row) or 'no columns'}; it needs messages, or prompt and completion"
    )


def _lines(file: Path) -> Iterator[bytes]:
    if file.suffix == ".gz":
        with gzip.open(file, "rb") as stream:
            yield from stream
    else:
        with file.open("rb") as stream:
            yield from stream


def _reason(error: DataError) -> str:
    return str(error).partition(": ")[2].split(" (")[0]
