"""The matrices of experts, each in memory of its own: views of a mapped file.

A published checkpoint has a tensor for each expert, in an order of its own, so a stack of them
would be a copy. Compiled products take a table of the matrices' addresses instead of a stack
(ops/experts/native.cpp), and read every matrix where it is. All other products make a stack,
dequantized, when they are called.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nemotron3.ops.weights.integer import ActivationFormat, IntegerWeight, products_in
from nemotron3.ops.weights.quantized import CompiledWeight, QuantizedWeight, Weight


class ExpertMatrices(QuantizedWeight):
    """Matrices [expert, out, in] of one compiled format that are not in one block of memory."""

    linear = CompiledWeight.linear
    routed_experts = CompiledWeight.routed_experts

    def __init__(self, matrices: Sequence[CompiledWeight]) -> None:
        """Hold the tensors of `matrices`, which have one class and one shape."""
        super().__init__()
        first = matrices[0]
        assert all(type(each) is type(first) and each.shape == first.shape for each in matrices)
        self.kind = type(first)
        self.format = first.format
        self._parts = [name for name, _ in first.named_buffers()]
        for expert, matrix in enumerate(matrices):
            for name, part in matrix.named_buffers():
                self.register_buffer(f"{name}_{expert}", part)
        self._shape = torch.Size((len(matrices), *first.shape))
        self._table: Tensor | None = None
        products_in(self, first.activations)

    @classmethod
    def empty(cls, shape: torch.Size) -> Self:
        """Refused: the matrices are those of a file, and the memory is its."""
        raise NotImplementedError(f"matrices of shape {tuple(shape)} have no memory to be in")

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized weight."""
        return self._shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight."""
        return torch.stack([matrix.dequantize(dtype) for matrix in self])

    def with_activations(self, activations: ActivationFormat | None) -> Self:
        """These matrices in the same memory, as `IntegerWeight.with_activations`."""
        if not issubclass(self.kind, IntegerWeight):
            return self
        experts = range(self._shape[0])
        return type(self)([self[expert].with_activations(activations) for expert in experts])

    def stacked(self) -> CompiledWeight:
        """A copy in one block of memory."""
        parts = zip(*(matrix.buffers() for matrix in self), strict=True)
        return self.kind(*(torch.stack(list(part)) for part in parts))

    def copy_(self, values: Weight) -> Self:
        """Copy the values of a tensor, quantizing them, or of another weight of this format."""
        for own, matrix in zip(self, values, strict=True):
            own.copy_(matrix)
        return self

    def parts(self) -> dict[str, Tensor]:
        """Copies of the tensors of a stack."""
        return self.stacked().parts()

    def load_part(self, name: str, stored: Tensor) -> None:
        """Copy one of `parts` from a file."""
        for own, part in zip(self, stored, strict=True):
            own.load_part(name, part)

    def __getitem__(self, index: Any) -> Any:
        """A view of one expert's matrix or of a part of it, or of the matrices of some experts."""
        if isinstance(index, slice):
            return type(self)([self[expert] for expert in range(self._shape[0])[index]])
        expert, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(expert, int):
            raise NotImplementedError(f"{expert!r} would be a stack; index one expert")
        expert = range(self._shape[0])[expert]
        parts = (self.get_buffer(f"{part}_{expert}") for part in self._parts)
        matrix = products_in(self.kind(*parts), self.activations)
        return matrix[tuple(rest)] if rest else matrix

    @property
    def table(self) -> Tensor:
        """Addresses of each expert's tensors, int64 [expert, part]; the matrices are contiguous."""
        table = self._table
        if table is None or next(self.buffers()).data_ptr() != table.numpy()[0, 0]:
            places = [buffer.data_ptr() for buffer in self.buffers()]
            table = torch.from_numpy(np.array(places).reshape(self._shape[0], len(self._parts)))
            self._table = table
        return table
