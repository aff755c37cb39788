"""The parts of a page: one self-contained HTML file, without scripts, in a light and a dark dress.

Every string is escaped: names, samples and settings are untrusted text.
"""

import html
from collections.abc import Collection, Sequence
from importlib import resources
from pathlib import Path

from nemotron3.observe.plots import Figure

Cell = str | int | float


def write_page(path: Path, *, title: str, lead: str, body: str, footer: str) -> Path:
    """Write a page, whole or not at all; `body` is HTML, the rest is text."""
    style = resources.files("nemotron3.observe").joinpath("report.css").read_text(encoding="utf-8")
    named = html.escape(title)
    said = f"<p>{html.escape(lead)}</p>" if lead else ""
    text = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{named}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{named}</h1>{said}</header>\n{body}"
        f"<footer>{html.escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )
    partial = path.with_suffix(".html.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def section(title: str, figures: Sequence[str]) -> str:
    """Figures under a heading; nothing where there are none."""
    body = "".join(figures)
    if not body:
        return ""
    return f'<section><h2>{html.escape(title)}</h2><div class="figures">{body}</div></section>\n'


def captioned(title: str, caption: str, figure: Figure | None) -> str:
    """A figure with its heading, caption and legend; nothing where there is no figure."""
    if figure is None:
        return ""
    legend = "".join(
        f'<span><i style="background:var(--{colour})"></i>{html.escape(label)}</span>'
        for colour, label in figure.legend
    )
    legend = f'<div class="legend">{legend}</div>' if legend else ""
    text = f"{caption} {figure.note}".strip()
    return (
        f"<figure><figcaption><h3>{html.escape(title)}</h3><p>{html.escape(text)}</p></figcaption>"
        f"{legend}{figure.svg}</figure>\n"
    )


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, right: Collection[str] = ()
) -> str:
    """A table; columns of numbers are set to the right, and those named in `right`."""

    def cell(tag: str, value: Cell, *, is_number: bool) -> str:
        text = value if isinstance(value, str) else f"{value:,}"
        kind = ' class="number"' if is_number else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    numeric = [
        name in right or all(not isinstance(row[i], str) for row in rows)
        for i, name in enumerate(columns)
    ]
    head = "".join(cell("th", c, is_number=n) for c, n in zip(columns, numeric, strict=True))
    body = "".join(
        "<tr>"
        + "".join(cell("td", v, is_number=n) for v, n in zip(row, numeric, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
