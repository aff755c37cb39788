"""Calling compiled functions with tensors."""

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron3.ops.native.build import library

MIN_PARALLEL_WORK = 1 << 15
"""Multiply-adds below which starting a second thread costs more than it gains."""
WORK_PER_THREAD = 3 << 19
"""Multiply-adds of a program per thread of its team."""

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
_WORDS = {"p": "q", "i": "q", "f": "d"}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Dtypes = tuple[torch.dtype, ...]

_num_threads = torch.get_num_threads
"""Threads of a team on idle processors; team.cpp uses fewer when processors are contended."""

Argument = Tensor | int | float | None


class NativeFunction:
    """A function of a C++ source, compiled and loaded when it is first called.

    `signature` has a letter per argument: p for a tensor (the address of its first element; null
    for None), i for an integer, f for a float; blanks only separate. The number of threads is
    appended as the last integer. The function does not check its arguments: callers are responsible
    for dtypes, shapes and strides.
    """

    def __init__(self, source: Path, name: str, signature: str) -> None:
        self.source, self.name = source, name
        self.types = [*(_TYPES[letter] for letter in signature if letter != " "), ctypes.c_int64]
        self._function: Any = None

    def __call__(self, *arguments: Argument) -> None:
        """Run it on as many threads as PyTorch uses."""
        if _thread.recording is not None:
            raise RuntimeError(f"{self.name} cannot be recorded; make it a ParallelKernel")
        function = self._function
        if function is None:
            function = getattr(library(self.source), self.name)
            function.argtypes, function.restype = self.types, None
            self._function = function
        function(
            *[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments],
            _num_threads(),
        )


_PROGRAM = Path(__file__).with_name("program.cpp")


class ParallelKernel:
    """A compiled function that all threads of a team call (team.h), and that can be recorded.

    `signature` is as for `NativeFunction`.
    """

    def __init__(self, source: Path, name: str, signature: str) -> None:
        self.source, self.name = source, name
        letters = signature.replace(" ", "")
        self._words = struct.Struct("".join(_WORDS[letter] for letter in letters))

    def __call__(self, *arguments: Argument, work: int, keeps: Sequence[Tensor] = ()) -> None:
        """Run it; `work` in multiply-adds decides whether to use more than one thread.

        `keeps` are tensors whose addresses are in an argument, for a recording to keep alive.
        """
        words = self._words.pack(
            *[a.data_ptr() if isinstance(a, Tensor) else a or 0 for a in arguments]
        )
        self._alone(words, _num_threads() if work > MIN_PARALLEL_WORK else 1)
        if _thread.recording is not None:
            operands = (*(a for a in arguments if isinstance(a, Tensor)), *keeps)
            _thread.recording.append(GraphNode(self._shared, words, operands, work))

    @cached_property
    def _alone(self) -> Any:
        function = getattr(library(self.source), self.name)
        function.argtypes, function.restype = (ctypes.c_char_p, ctypes.c_int64), None
        return function

    @cached_property
    def _shared(self) -> int:
        function = getattr(library(self.source), f"{self.name}_node")
        return ctypes.cast(function, ctypes.c_void_p).value or 0


@dataclass(frozen=True)
class GraphNode:
    """A call of a `ParallelKernel` that a program can repeat."""

    function: int
    """Address of the function that each thread of the team calls."""
    words: bytes
    operands: tuple[Tensor, ...]
    """Tensors that must stay alive, since `words` holds their addresses."""
    work: int
    """Multiply-adds."""


class _Thread(threading.local):
    """State of the calling thread, like PyTorch's dispatch modes.

    Engines and trainers of one process compute in threads of their own. With a shared list, one
    would replay the calls of another.
    """

    recording: list[Any] | None = None


_thread = _Thread()


@contextmanager
def recording(calls: list[Any]) -> Iterator[None]:
    """Append each compiled call of this thread in the `with` block to `calls`, as a `GraphNode`."""
    outer = _thread.recording
    _thread.recording = calls
    try:
        yield
    finally:
        _thread.recording = outer


class Program:
    """Calls of compiled functions that one team of threads runs one after another.

    The size of the team follows from the work. A step of a very small model runs on one thread: two
    threads would lose at barriers what they gain, and would take a processor from the process that
    sends the tokens to clients.
    """

    def __init__(self, calls: list[GraphNode]) -> None:
        self._calls = calls
        self.num_threads = max(1, sum(call.work for call in calls) // WORK_PER_THREAD)
        """Threads of its team, at most those that PyTorch uses."""
        self._words = [ctypes.create_string_buffer(call.words, len(call.words)) for call in calls]
        self._table = (ctypes.c_int64 * (2 * len(calls)))()
        for i, (call, words) in enumerate(zip(calls, self._words, strict=True)):
            self._table[2 * i : 2 * i + 2] = [call.function, ctypes.addressof(words)]
        self._run = library(_PROGRAM).run_program
        self._run.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
        self._run.restype = None

    def __call__(self) -> None:
        """Run all calls."""
        self._run(self._table, len(self._calls), min(self.num_threads, _num_threads()))


FLOAT32: Dtypes = (torch.float32,)
FLOATS: Dtypes = (torch.float32, torch.bfloat16)


def supports(x: Tensor, dtypes: Dtypes = FLOAT32) -> bool:
    """Whether compiled functions that take these dtypes can take a tensor like this one."""
    return x.dtype in dtypes and x.is_cpu


def name_of(*dtypes: torch.dtype) -> str:
    """The ending of the name of a compiled function for operands of these dtypes."""
    return "_".join(_NAMES[dtype] for dtype in dtypes)


@cache
def multiplies_bfloat16() -> bool:
    """Whether products of bfloat16 use instructions of this processor; otherwise those of float32.

    Raises BackendUnavailableError without a compiler.
    """
    return bool(library(_PROGRAM).multiplies_bfloat16())
