"""The tables of a run, as text for a terminal and as Markdown for the page."""

from collections.abc import Iterator, Sequence

from benchmarks.gpu.record import Results
from benchmarks.gpu.section import Rows, Section
from benchmarks.gpu.sections.limits import warnings


def as_text(sections: Sequence[Section], results: Results) -> str:
    """The tables as text for a terminal; the verdict comes last."""
    blocks = [
        f"\n{section.title}\n" + "\n".join(as_lines(rows))
        for section in sections
        if (rows := section.table(results))
    ]
    return "\n".join([*blocks, "", *notes(results)])


def as_markdown(sections: Sequence[Section], results: Results) -> str:
    """The tables as Markdown for the page."""
    text = ""
    for section in sections:
        if rows := section.table(results):
            head, *rest = rows
            rule = ["---", *["---:"] * (len(head) - 1)]
            lines = "".join("| " + " | ".join(row) + " |\n" for row in (head, rule, *rest))
            text += f"\n**{section.title}**\n\n{lines}"
    return text + "".join(f"\n{line}\n" for line in notes(results))


def notes(results: Results) -> Iterator[str]:
    """Notes that precede the figures."""
    for line in warnings(results):
        yield f"WARNING: {line}"
    if missing := results.missing():
        yield "Not measured: " + "; ".join(line.splitlines()[0] for line in missing)
    if red := results.disagreements():
        yield "NOT COMPARED, since parity is not green: " + "; ".join(red)


def as_lines(rows: Rows) -> Iterator[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for name, *cells in rows:
        line = [name.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join(line).rstrip()
