"""The interface of a section: parts that are measured, and a table that shows them.

To add one, add a file to `sections/` that ends in `SECTION = Section(...)`; the program, the
summary and the page of the documentation find it there.

A part is a function without arguments that returns a figure, a JSON object. It may raise: the error
is then saved in place of the figure, and the next part runs. Figures contain no ratios between
programs; these are computed for display, and only if `Results.may_compare` allows it.
"""

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from benchmarks.gpu import inference
from benchmarks.gpu import sections as folder
from benchmarks.gpu.record import Figure, Results
from benchmarks.gpu.setting import Setting

Part = Callable[[], Figure]
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures that are measured one after another in one process."""

    name: str
    """Name in the record and on the command line."""
    title: str
    """Title of its table."""
    order: int
    """Sections run in this order; the first ones are measured even if time runs out."""
    budget_s: float
    """Seconds that are reserved for it; it may also use time that earlier ones left."""
    parts: Callable[[Setting], Mapping[str, Part]]
    """Names of parts, and how to measure each."""
    table: Callable[[Results], Rows]
    """A header and rows of text, from all results; empty if there are no figures."""


def all_sections() -> list[Section]:
    """Every section of `make gpu-check`, the most important first."""
    return _of(folder)


def inference_sections() -> list[Section]:
    """Every section of `make gpu-check-inference`, the most important first."""
    return _of(inference)


def _of(package: ModuleType) -> list[Section]:
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = [import_module(f"{package.__name__}.{name}").SECTION for name in names]
    return sorted(found, key=lambda section: section.order)
