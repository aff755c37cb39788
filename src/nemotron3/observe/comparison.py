"""One HTML file that shows several runs: results side by side, tests, and overlaid curves."""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemotron3.observe.page import Cell, captioned, section, table, write_page
from nemotron3.observe.plots import Axis, Range, Series, lines, ranges

_SECTIONS = {
    "Quality": r"train/(loss|accuracy).*|eval/.*",
    "Rewards": r"reward/.*|rollouts/.*",
    "Policy": r"policy/.*",
    "Optimisation": r"optim/.*|train/aux_loss",
    "Inside the model": r"moe/.*|model/.*",
    "Speed": r"perf/.*",
    "Other metrics": r".*",
}
"""Sections by the metrics that belong to them; the first that matches is it."""
_OF_A_LAYER = re.compile(r".*_layer_\d+")
_LOGARITHMIC = re.compile(r"train/loss.*|optim/grad_norm|policy/logprob_error")
_RARE = re.compile(r"eval/.*|optim/lr")
"""Not averaged: a few points, or exact ones."""

_WORDS = ("verdict", "why")
"""Columns that are read as words, beside the first."""


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """What the page says."""

    title: str
    lead: str
    results: Sequence[Sequence[Cell]]
    """Rows of the first table, the names of the columns first."""
    tests: Sequence[Sequence[Cell]] = ()
    """The same of the paired tests."""
    differences: Sequence[Range] = ()
    """What the tests found, for a figure."""
    notes: Sequence[str] = ()
    """Sentences below the tests."""
    curves: Mapping[str, Mapping[str, Series]] = field(
        default_factory=dict[str, Mapping[str, Series]]
    )
    """By run, its metrics by name."""


def write_comparison(path: Path, page: ComparisonPage) -> Path:
    """Write the page; what no two runs have in common has no figure."""
    body = _tables("Results", page.results)
    if page.tests:
        body += _tables("Paired tests", page.tests, page.notes)
        drawn = ranges(page.differences, x_label="difference")
        caption = "Simultaneous intervals, in colour where the difference is significant."
        body += section("Differences", [captioned("Second minus first", caption, drawn)])
    body += "".join(section(title, figures) for title, figures in _figures(page.curves).items())
    return write_page(
        path, title=page.title, lead=page.lead, body=body, footer="Written by nemotron3 compare."
    )


def _tables(title: str, rows: Sequence[Sequence[Cell]], notes: Sequence[str] = ()) -> str:
    columns, *content = rows
    right = [str(name) for name in columns[1:] if name not in _WORDS]
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    below = f"<ul>{said}</ul>" if said else ""
    shown = table([str(name) for name in columns], content, right=right)
    return f"<section><h2>{title}</h2>{shown}{below}</section>\n"


def _figures(curves: Mapping[str, Mapping[str, Series]]) -> dict[str, list[str]]:
    """The figures of the metrics that two or more runs have, by section."""
    found: dict[str, list[str]] = {title: [] for title in _SECTIONS}
    names = dict.fromkeys(name for metrics in curves.values() for name in metrics)
    for name in names:
        having = {run: metrics[name] for run, metrics in curves.items() if name in metrics}
        if len(having) < 2 or _OF_A_LAYER.fullmatch(name):
            continue
        title = next(title for title, own in _SECTIONS.items() if re.fullmatch(own, name))
        found[title].append(_figure(name, having))
    return found


def _figure(name: str, having: Mapping[str, Series]) -> str:
    scale: Axis = "log" if _LOGARITHMIC.fullmatch(name) else "linear"
    series = [Series(label=run, steps=one.steps, values=one.values) for run, one in having.items()]
    drawn = lines(
        series, y_label=name.rpartition("/")[2], scale=scale, is_smoothed=not _RARE.fullmatch(name)
    )
    return captioned(name, "", drawn)
