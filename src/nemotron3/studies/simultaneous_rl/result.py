"""The result of the study as it is kept and published: every cell, every comparison."""

from dataclasses import dataclass

from nemotron3.studies.simultaneous_rl.cell import CellResult
from nemotron3.studies.simultaneous_rl.config import SimultaneousRL
from nemotron3.studies.simultaneous_rl.findings import Finding
from nemotron3.studies.simultaneous_rl.plan import Plan, Timing


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Everything that the pages are made of."""

    command: str
    date: str
    commit: str
    """Of this package; "unknown" outside of its repository."""
    device: str
    study: SimultaneousRL
    timing: Timing
    plan: Plan
    cells: tuple[CellResult, ...]
    findings: tuple[Finding, ...]
