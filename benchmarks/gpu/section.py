"""What a section of figures is: parts that are measured, and a table that shows them.

To add one, add a file to `sections/` that ends in `SECTION = Section(...)`; the program, the
summary and the page of the documentation find it there.

A part is a function without arguments that returns a figure, a JSON object. It may raise: the error
then stands in the figure's place, and the next part goes on. Ratios between programs are no part of
a figure. They are made when figures are shown, and only by `Results.may_compare`.
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
    """As in the record and on the command line."""
    title: str
    """As above its table."""
    order: int
    """Lower ones come first, and lose nothing when time runs out."""
    budget_s: float
    """Seconds that are kept for it; it may take what earlier ones left."""
    parts: Callable[[Setting], Mapping[str, Part]]
    """Names of parts, and how to measure each."""
    table: Callable[[Results], Rows]
    """A head and rows of words, from all results; no rows where there is nothing to show."""


def all_sections() -> list[Section]:
    """Every section of `make gpu-check`, the most important first."""
    return _of(folder)


def inference_sections() -> list[Section]:
    """Every section of `make gpu-check-inference`, likewise."""
    return _of(inference)


def _of(package: ModuleType) -> list[Section]:
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    found = [import_module(f"{package.__name__}.{name}").SECTION for name in names]
    return sorted(found, key=lambda section: section.order)
