"""What a program may use, and what became of it."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from nemotron3.errors import ConfigError

_LEAST_MEMORY_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. It is one process with one thread, and writes no files.

    Raises `ConfigError` for a limit that no program could keep.
    """

    cpu_s: float = 2.0
    """Processor time, in whole seconds, rounded, at least one."""
    wall_s: float = 10.0
    """Time on the clock: what ends a program that sleeps. On a busy machine it passes several times
    as fast as processor time, and is not to end a program that only waits for its turn."""
    memory_bytes: int = 256 << 20
    """Address space, the interpreter's 30 MiB included."""
    output_bytes: int = 1 << 20
    """Of standard output, of standard error, and of the results of calls: each."""

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s", "memory_bytes", "output_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"is {value}; give a positive number", field=name)
        if self.memory_bytes < _LEAST_MEMORY_BYTES:
            raise ConfigError(
                f"is {self.memory_bytes}; the interpreter alone needs {_LEAST_MEMORY_BYTES}",
                field="memory_bytes",
            )


class Ending(StrEnum):
    """How a program ended. All but the first are its own fault."""

    OK = "ok"
    ERROR = "error"
    """An exception, an exit status that is not 0, or a signal."""
    TIMEOUT = "timeout"
    OUTPUT = "too_much_output"


@dataclass(frozen=True, kw_only=True)
class ProgramResult:
    """What a program left behind."""

    ending: Ending
    exit_status: int
    """Negative: the number of the signal that ended it."""
    stdout: str
    """Decoded as UTF-8; what is none is replaced by U+FFFD."""
    stderr: str
    results: tuple[tuple[Any, ...], ...] = ()
    """For each call (value,) as JSON has it, or () where it raised or gave what JSON has not.

    There are fewer where the program ended before its last call.
    """
    cpu_s: float
