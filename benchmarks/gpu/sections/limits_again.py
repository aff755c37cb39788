"""The limits measured again at the end, to detect a device that became slower under load."""

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
