"""The result of the study as it is kept and published: every cell, every comparison."""

from dataclasses import dataclass

from nemotron3.studies.nvfp4.cell import CellResult
from nemotron3.studies.nvfp4.config import NVFP4Study
from nemotron3.studies.nvfp4.findings import Finding
from nemotron3.studies.nvfp4.ingredients import Rounding
from nemotron3.studies.nvfp4.plan import Plan, Timing
from nemotron3.studies.study import Published


@dataclass(frozen=True, kw_only=True)
class StudyResult(Published):
    """Everything that the pages are made of."""

    study: NVFP4Study
    timing: Timing
    plan: Plan
    roundings: tuple[Rounding, ...]
    """Error and bias of each ingredient by itself."""
    cells: tuple[CellResult, ...]
    findings: tuple[Finding, ...]
