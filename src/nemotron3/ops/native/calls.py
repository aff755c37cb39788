"""Calling the compiled functions with tensors."""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron3.ops.native.build import library

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}


class NativeFunction:
    """A function of a C++ source, compiled and loaded when it is first called.

    `signature` has a letter per argument: p for a tensor (its first element; None is null), i for
    an integer, f for a float; blanks are for the reader. The number of threads follows as a last
    integer by itself. The function trusts what it is given: callers see to shapes and strides.
    """

    def __init__(self, source: Path, name: str, signature: str) -> None:
        self.source, self.name = source, name
        self.types = [*(_TYPES[letter] for letter in signature if letter != " "), ctypes.c_int64]
        self._function: Any = None

    def __call__(self, *arguments: Tensor | int | float | None) -> None:
        """Run it on the threads that PyTorch uses."""
        function = self._function
        if function is None:
            function = getattr(library(self.source), self.name)
            function.argtypes, function.restype = self.types, None
            self._function = function
        function(
            *[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments],
            torch.get_num_threads(),
        )


def serves(x: Tensor) -> bool:
    """Whether compiled functions can take a tensor like this one: float32 on the CPU."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` itself where its last axis is contiguous (a slice of columns is), else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
