"""Operations in C++, compiled on the machine that runs them.

PyTorch does each elementary operation in a pass of its own over memory, at several microseconds of
overhead. On a CPU that is what training and decoding of small models are held by, so the operations
the model spends its time in have a third implementation beside `reference` and `torch`: a file
`native.cpp` in the operation's folder, without headers of PyTorch, called through ctypes.
"""

from nemotron3.ops.native.build import available
from nemotron3.ops.native.calls import (
    NativeFunction,
    Program,
    SharedCall,
    TeamFunction,
    contiguous_rows,
    recording,
    serves,
)

__all__ = [
    "NativeFunction",
    "Program",
    "SharedCall",
    "TeamFunction",
    "available",
    "contiguous_rows",
    "recording",
    "serves",
]
