"""The limits once more at the end: a device that grew slow under load says so here."""

from benchmarks.gpu.section import Section
from benchmarks.gpu.sections import limits

SECTION = Section(
    name="limits-again",
    title="Limits at the end",
    order=100,
    budget_s=25,
    parts=limits.parts,
    table=lambda results: limits.rows_of(results, "limits-again"),
)
