"""Conversations to train on, one JSON object per line: messages, or a prompt and its completion.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"messages": [...], "tools": [...], "effort": "low"}
    {"prompt": "2+2?", "completion": "4"}

`messages` and `tools` have OpenAI's format, with the reasoning of an answer in `reasoning_content`;
an assistant message with `"train": false` or `"weight": 0` is context only. `tools` may be JSON
text, as data sets of Hugging Face store them. `prompt` and `completion` are strings or lists of
messages. Other columns are ignored.

A row that cannot be used is an error that names its file, line and reason. `max_bad_fraction`
allows a share of such rows; they are skipped and counted.
"""

import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from nemotron3.errors import ConfigError, DataError, Nemotron3Error
from nemotron3.observe.metrics import is_metric_name
from nemotron3.text.messages import (
    AssistantMessage,
    Message,
    Tool,
    UserMessage,
    parse_messages,
    parse_tools,
)

_TOO_DEEP = "the row is nested too deep; write it flatter"
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
        if self.name and (self.name == "all" or not is_metric_name(f"eval/{self.name}")):
            raise ConfigError(
                f"is {self.name!r}; it must be of printable characters, and not 'all', which is "
                "all sources together",
                field="data.name",
            )
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"is {self.weight}; it must be above 0, and finite", field="data.weight"
            )
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(
                f"is {self.max_bad_fraction}; it must be at least 0 and below 1",
                field="data.max_bad_fraction",
            )

    @property
    def title(self) -> str:
        """The source's name."""
        return self.name or _printable(Path(self.path).name.partition(".")[0]) or "data"


def with_different_titles(
    sources: Sequence[ConversationsConfig],
) -> tuple[ConversationsConfig, ...]:
    """The sources, with names where their titles are the same: the ends of their paths.

    `a/chats.jsonl` and `b/chats.jsonl` are `a-chats` and `b-chats`. Raises ConfigError for a path
    that is given twice.
    """
    paths = [Path(source.path).expanduser().absolute() for source in sources]
    if twice := [str(path) for path in paths if paths.count(path) > 1]:
        raise ConfigError(
            f"{twice[0]} is given twice; give it once, with a weight of 2 to have each of its "
            "conversations twice"
        )
    parts = [(*path.parts[1:-1], _without_suffix(path.name)) for path in paths]
    used = [0] * len(sources)  # parts of each path that its name has; 0 for the title
    while True:
        titles = [
            _printable("-".join(own[-count:])) if count else source.title
            for source, own, count in zip(sources, parts, used, strict=True)
        ]
        alike = [i for i, title in enumerate(titles) if titles.count(title) > 1 or title == "all"]
        longer = [i for i in alike if not sources[i].name and used[i] < len(parts[i])]
        if not longer:
            break
        for index in longer:
            used[index] += 1
    return tuple(
        replace(source, name=title) if count else source
        for source, title, count in zip(sources, titles, used, strict=True)
    )


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
    config: ConversationsConfig,
    report: ConversationsReport | None = None,
    *,
    check: Callable[[Conversation], object] = lambda _: None,
) -> Iterator[Conversation]:
    """The conversations of a source in the order of its files and lines.

    A row for which `check` raises an error of the package cannot be used, too.
    """
    report = ConversationsReport() if report is None else report
    first_bad: DataError | None = None
    for file in conversation_files(config):
        for number, line in enumerate(_lines(file), start=1):
            if not line.strip():
                continue
            report.rows += 1
            try:
                found = parse_conversation(line, place=f"{file}:{number}")
                _checked(found, check)
            except DataError as error:
                first_bad = first_bad or error
                report.bad[_reason(error)] += 1
                if not config.max_bad_fraction:
                    raise
            else:
                yield found
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
    except RecursionError as error:
        raise DataError(f"{place}: {_TOO_DEEP}") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: the row is {type(row).__name__}; a JSON object was expected")
    fields = cast(Mapping[str, Any], row)
    try:
        messages = _messages(fields)
        tools = parse_tools(_tools(fields.get("tools")))
    except DataError as error:
        raise DataError(f"{place}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{place}: {_TOO_DEEP}") from error
    effort = fields.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise DataError(f"{place}: effort is {effort!r}; it must be a string")
    if not any(isinstance(m, AssistantMessage) and m.is_trained for m in messages):
        raise DataError(
            f"{place}: no message of the assistant can be trained; add one, or drop the row"
        )
    return Conversation(messages=messages, tools=tools, effort=effort, place=place)


def _checked(conversation: Conversation, check: Callable[[Conversation], object]) -> None:
    try:
        check(conversation)
    except Nemotron3Error as error:
        raise DataError(f"{conversation.place}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{conversation.place}: {_TOO_DEEP}") from error


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    if "messages" in row:
        return _marked(row["messages"], "messages")
    if "prompt" in row and "completion" in row:
        prompt = _said(row["prompt"], "prompt", UserMessage)
        context = (
            replace(message, is_trained=False) if isinstance(message, AssistantMessage) else message
            for message in prompt
        )
        return (*context, *_said(row["completion"], "completion", AssistantMessage))
    raise DataError(
        f"the row has {', '.join(row) or 'no columns'}; it needs messages, or prompt and completion"
    )


def _said(
    value: Any, column: str, kind: type[UserMessage] | type[AssistantMessage]
) -> tuple[Message, ...]:
    """A text as one message, or a list of messages."""
    if isinstance(value, str):
        return (kind(content=value),)
    if isinstance(value, list):
        return _marked(cast(list[Any], value), column)
    found = json.dumps(value)  # null, NaN, 3
    shown = found if len(found) <= 40 else f"of type {type(value).__name__}"
    raise DataError(f"is {shown}; a text or a list of messages was expected", field=column)


def _marked(given: Any, column: str) -> tuple[Message, ...]:
    """Messages, with those that are marked as context."""
    try:
        parsed = parse_messages(given)
    except DataError as error:
        at = (error.field or "").removeprefix("messages")
        raise DataError(error.problem, field=f"{column}{at}", other=error.other) from error
    marks = [_is_trained(raw, f"{column}[{place}]") for place, raw in enumerate(given)]
    return tuple(
        replace(message, is_trained=message.is_trained and is_trained)
        if isinstance(message, AssistantMessage)
        else message
        for message, is_trained in zip(parsed, marks, strict=True)
    )


def _is_trained(raw: Any, where: str) -> bool:
    """Whether a message may be a target: by `train`, or by OpenAI's `weight` of 0 or 1."""
    marks = cast(Mapping[str, Any], raw) if isinstance(raw, Mapping) else {}
    train, weight = marks.get("train"), marks.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"is {train!r}; it must be true or false", field=f"{where}.train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"is {weight!r}; it must be 0, for context, or 1", field=f"{where}.weight")
    if train is not None and weight is not None and train != (weight == 1):
        raise DataError(
            f"is {weight!r} and train is {train}; leave one of them out", field=f"{where}.weight"
        )
    return train is not False and weight != 0


def _tools(given: Any) -> Any:
    """Tools as they are, or from JSON text of all of them or of each."""
    if isinstance(given, str):
        given = _from_json(given, "tools") if given.strip() else None
    if isinstance(given, list):
        return [
            _from_json(tool, f"tools[{place}]") if isinstance(tool, str) else tool
            for place, tool in enumerate(cast(list[Any], given))
        ]
    return given


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"is a text and not JSON ({error})", field=where) from error


def _without_suffix(name: str) -> str:
    suffix = next((end for end in sorted(_SUFFIXES, key=len)[::-1] if name.endswith(end)), "")
    return name.removesuffix(suffix)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "_" for c in text).strip()


def _lines(file: Path) -> Iterator[bytes]:
    if file.suffix == ".gz":
        with gzip.open(file, "rb") as stream:
            yield from stream
    else:
        with file.open("rb") as stream:
            yield from stream


def _reason(error: DataError) -> str:
    return str(error).partition(": ")[2].split(" (")[0]
