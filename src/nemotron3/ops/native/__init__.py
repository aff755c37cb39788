"""Operations in C++, compiled on the machine that runs them.

PyTorch makes a pass over memory for each elementary operation, with an overhead of several
microseconds. On a CPU this limits the training and decoding of small models. The operations in
which the model spends its time therefore have a third implementation besides `reference` and
`torch`: a file `native.cpp` in the operation's folder, without PyTorch's headers, called through
ctypes.
"""

from nemotron3.ops.native.build import available
from nemotron3.ops.native.calls import (
    FLOAT32,
    FLOATS,
    Dtypes,
    GraphNode,
    NativeFunction,
    ParallelKernel,
    Program,
    multiplies_bfloat16,
    name_of,
    recording,
    supports,
)

__all__ = [
    "FLOAT32",
    "FLOATS",
    "Dtypes",
    "GraphNode",
    "NativeFunction",
    "ParallelKernel",
    "Program",
    "available",
    "multiplies_bfloat16",
    "name_of",
    "recording",
    "supports",
]
