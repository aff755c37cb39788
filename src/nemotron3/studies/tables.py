"""The pages of a study: the same tables as one HTML file and as Markdown for the documentation."""

import html
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron3.config import to_record
from nemotron3.observe.page import table, write_page
from nemotron3.studies.study import Published

Rows = list[list[str]]
"""A table; the first row names the columns."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a page."""

    heading: str
    caption: str
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class StudyPage:
    """What both forms of a page show."""

    title: str
    origin: str
    """What was trained, where and when: a paragraph."""
    asked: Sequence[str]
    """The question and the arms, a paragraph each."""
    seen: str
    """What so many seeds can show: a sentence."""
    tables: Sequence[Table]
    words: Collection[str]
    """Columns that are read as words; all others are set to the right, as numbers are."""


def write_study_page(path: Path, page: StudyPage, result: Published, figures: str) -> Path:
    """Write the HTML file, which needs no network; `figures` is HTML."""
    record = to_record(result)
    body = "".join(
        [
            _paragraphs("What is asked", [*page.asked, page.seen]),
            *(_section(shown, page.words) for shown in page.tables if len(shown.rows) > 1),
            figures,
            f"<section><h2>Run it again</h2><pre>{html.escape(result.command)}</pre><details>"
            f"<summary>Configuration</summary><pre>{_json(record['study'])}</pre></details>"
            "</section>\n",
        ]
    )
    footer = f"Written by {' '.join(result.command.split()[:3])}, {result.date}."
    return write_page(path, title=page.title, lead=page.origin, body=body, footer=footer)


def as_markdown(page: StudyPage, command: str) -> str:
    """The tables and what is needed to read them."""
    parts = [f"`{command}`, {page.origin}", page.seen]
    for shown in page.tables:
        if len(shown.rows) > 1:
            parts += [f"### {shown.heading}", _plain(shown.caption)]
            parts.append(_markdown(shown.rows, page.words))
    return "\n\n".join(parts) + "\n"


def _section(shown: Table, words: Collection[str]) -> str:
    columns, *content = shown.rows
    drawn = table(columns, content, right=[name for name in columns if name not in words])
    heading, caption = html.escape(shown.heading), html.escape(shown.caption)
    return f"<section><h2>{heading}</h2><p>{caption}</p>{drawn}</section>\n"


def _paragraphs(heading: str, texts: Sequence[str]) -> str:
    said = "".join(f"<p>{html.escape(text)}</p>" for text in texts)
    return f"<section><h2>{html.escape(heading)}</h2>{said}</section>\n"


def _json(record: Any) -> str:
    return html.escape(json.dumps(record, indent=2))


def _markdown(rows: Rows, words: Collection[str]) -> str:
    head, *_ = rows
    rule = ["---" if name in words else "---:" for name in head]
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that neither ends a cell of a table nor is read as HTML."""
    flat = " ".join(text.split())
    return flat.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
