"""The result of the study as it is kept and published: every cell, every comparison."""

from dataclasses import dataclass

from nemotron3.studies.simultaneous_rl.cell import CellResult
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL
from nemotron3.studies.simultaneous_rl.findings import Finding
from nemotron3.studies.simultaneous_rl.plan import Plan, Timing
from nemotron3.studies.study import Published


@dataclass(frozen=True, kw_only=True)
class StudyResult(Published):
    """Everything that the pages are made of."""

    study: SimultaneousRL
    timing: Timing
    plan: Plan
    cells: tuple[CellResult, ...]
    findings: tuple[Finding, ...]
