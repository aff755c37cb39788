"""`nemotron3 compare`: runs and evaluations side by side, in the terminal and on a page."""

import argparse
import math
from pathlib import Path

from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.observe.comparison import ComparisonPage, write_comparison
from nemotron3.observe.plots import Range
from nemotron3.recipes.comparison import Comparison, Tested, compare

_TEST_COLUMNS = ("second - first", "n", "difference", "interval", "p, Holm", "verdict", "why")


def compare_command(known: argparse.Namespace) -> int:
    """Read, print, and write the page."""
    out: Path = known.out
    if out.suffix != ".html" or out.is_dir():
        raise ConfigError(f"is {out}; give the name of an .html file", field="--out")
    found = compare(known.runs, smallest_effect=known.smallest_effect, alpha=known.alpha)
    print(comparison_text(found))
    _write(out, found, alpha=known.alpha)
    print(f"\npage: {out}")
    return 0


def comparison_text(found: Comparison) -> str:
    """The tables, for a terminal."""
    rows = _result_rows(found)
    lines = _columns([[str(cell) for cell in row] for row in rows])
    if found.tested:
        tests = [list(_TEST_COLUMNS), *(_test_row(each) for each in found.tested)]
        lines += ["", f"paired tests, {_how(found)}", *_columns(tests)]
    lines += ["", *(f"note: {note}" for note in found.notes)] if found.notes else []
    return "\n".join(lines)


def _how(found: Comparison) -> str:
    level = found.tested[0].finding.comparison.interval.level
    return f"p-values corrected for {len(found.tested)} tests, intervals at {100 * level:.3g}%"


def _result_rows(found: Comparison) -> list[list[str]]:
    rows = [["result", *(f"{each.name} ({each.kind})" for each in found.compared)]]
    for name, values in found.results.items():
        rows.append([name, *(_number(value) for value in values)])
    return rows


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _test_row(tested: Tested) -> list[str]:
    finding = tested.finding
    comparison = finding.comparison
    interval = comparison.interval
    return [
        f"{tested.what}: {tested.second} - {tested.first}",
        str(comparison.n),
        f"{comparison.difference:+.4f}",
        f"[{interval.low:+.3f}, {interval.high:+.3f}]",
        f"{finding.adjusted_p:.2g}",
        str(finding.verdict),
        finding.reason,
    ]


def _columns(rows: list[list[str]]) -> list[str]:
    """Rows with their columns below each other, numbers to the right."""
    words = {0} | {i for i, name in enumerate(rows[0]) if name in ("verdict", "why")}
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if place in words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _range(tested: Tested, alpha: float) -> Range:
    comparison = tested.finding.comparison
    return Range(
        label=f"{tested.what}: {tested.second} - {tested.first}",
        value=comparison.difference,
        low=comparison.interval.low,
        high=comparison.interval.high,
        is_strong=tested.finding.adjusted_p <= alpha,
    )


def _write(out: Path, found: Comparison, *, alpha: float) -> None:
    tests = [list(_TEST_COLUMNS), *(_test_row(each) for each in found.tested)]
    page = ComparisonPage(
        title="Comparison of " + ", ".join(each.name for each in found.compared),
        lead="; ".join(f"{each.name}: {each.kind}, {each.path}" for each in found.compared),
        results=_result_rows(found),
        tests=tests if found.tested else (),
        differences=[_range(each, alpha) for each in found.tested],
        notes=[_how(found), *found.notes] if found.tested else found.notes,
        curves={each.name: each.metrics for each in found.compared if each.metrics},
    )
    try:
        write_comparison(out, page)
    except ImportError as error:
        raise DependencyMissingError(str(error)) from error
