"""A device's memory, and plans of what a program will keep there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from nemotron3.runtime.control_groups import PROCESS, group_folders, words

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_MACHINE = Path("/proc/meminfo")


@dataclass(frozen=True, kw_only=True)
class MemoryPart:
    """A part of what a program keeps in memory."""

    name: str
    num_bytes: int
    is_estimate: bool = False
    """Whether the bytes are an upper bound; otherwise they are exact."""
    is_elastic: bool = False
    """Whether the part is made smaller where memory is short, at the cost of speed."""


@dataclass(frozen=True)
class MemoryPlan:
    """What a program will keep in a device's memory at its highest point."""

    parts: tuple[MemoryPart, ...]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def certain(self) -> int:
        """Bytes of the parts that are exact."""
        return sum(part.num_bytes for part in self.parts if not part.is_estimate)

    @property
    def elastic(self) -> int:
        """Bytes of the parts that are made smaller where memory is short."""
        return sum(part.num_bytes for part in self.parts if part.is_elastic)

    @property
    def largest(self) -> list[MemoryPart]:
        """The parts, largest first."""
        return sorted(self.parts, key=lambda part: -part.num_bytes)

    def line(self) -> str:
        """The parts in one line, largest first, without those of less than a hundredth."""
        named = (part for part in self.largest if part.num_bytes >= self.total / 100)
        return ", ".join(f"{part.name} {in_units(part.num_bytes)}" for part in named)


def plan_of(parts: Iterable[MemoryPart]) -> MemoryPlan:
    """A plan of the parts that have any bytes."""
    return MemoryPlan(tuple(part for part in parts if part.num_bytes))


def in_units(num_bytes: float) -> str:
    """A size with its unit, of 10^9, 10^6 or 10^3 bytes: `63.2 GB`."""
    for size, unit in _UNITS:
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"


def usable_memory_bytes(device: torch.device) -> int | None:
    """The most that a program can have of a device: all of a GPU's memory; of the host's, what is
    free or can be freed, within the limits of the process's control groups. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory_bytes()


def host_memory_bytes(process: Path = PROCESS, machine: Path = _MACHINE) -> int | None:
    """Of the host; `process` is the folder in /proc of a process, `machine` the file meminfo."""
    bounds = [
        int(limit[0])
        for folder in group_folders("memory", process)
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := words(folder / name)) and limit[0].isdecimal()
    ]
    if machine.exists():
        lines = dict(line.split(":", 1) for line in machine.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            free = (lines["MemAvailable"], lines.get("SwapFree", "0"))
            bounds.append(sum(int(line.split()[0]) << 10 for line in free))
    return min(bounds, default=None)
