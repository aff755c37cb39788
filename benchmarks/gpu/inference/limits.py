"""The limits to which shares refer, measured in the same call."""

from dataclasses import replace

from benchmarks.gpu.sections import limits

SECTION = replace(limits.SECTION, order=0)
