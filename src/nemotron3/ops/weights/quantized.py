"""What a product asks of a weight that is kept in a narrower number format.

A weight is a tensor or a `QuantizedWeight`, which holds its codes and scales as buffers and stands
in a module where the parameter would. It names the kernels that multiply with it, so an operation
knows no format, and it can be indexed along its leading axes (an expert, some rows) like a tensor.
It is frozen: products have gradients with respect to their input and none with respect to it.

The kernels of this class dequantize whole weights first, on every backend: a format is complete
with `empty`, `dequantize`, `copy_` and `parts`, and gets kernels of its own where speed wants them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from nemotron3.ops.backends import Implementations, Kernel

_LINEAR = "nemotron3.ops.linear.dequantized"
_EXPERTS = "nemotron3.ops.experts.dequantized"


class QuantizedWeight(nn.Module, ABC):
    """A matrix [out, in], or one for each expert, in a number format of its own."""

    format: ClassVar[str]
    """The format's name, in options and in config.json."""
    linear: ClassVar[Implementations] = MappingProxyType(
        {
            "reference": Kernel(_LINEAR, "linear_dequantized_reference"),
            "torch": Kernel(_LINEAR, "linear_dequantized_torch"),
        }
    )
    """What makes `x W^T` of (x, weight)."""
    routed_experts: ClassVar[Implementations] = MappingProxyType(
        {
            "reference": Kernel(_EXPERTS, "routed_experts_dequantized_reference"),
            "torch": Kernel(_EXPERTS, "routed_experts_dequantized_torch"),
            "native": Kernel(_EXPERTS, "routed_experts_dequantized_native"),
            "triton": Kernel(_EXPERTS, "routed_experts_dequantized_triton"),
        }
    )
    """What applies routed experts, with the operands of `ops.experts.routed_experts`."""

    @classmethod
    @abstractmethod
    def empty(cls, shape: torch.Size) -> Self:
        """A weight of this shape without values, on PyTorch's default device."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the matrix, or matrices, that it stands for."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix itself, computed in float32 at least and then rounded to `dtype`."""

    @abstractmethod
    def copy_(self, values: "Weight") -> Self:
        """Take the values of a tensor, rounded, or those of another weight of the format."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors it consists of, by what stands behind a weight's name in a file."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Self:
        """Part of it, in the same memory; `index` is for the axes before the last."""

    def __iter__(self) -> Iterator[Self]:
        """Its parts along the first axis."""
        return (self[i] for i in range(self.shape[0]))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.buffers()).device

    @property
    def nbytes(self) -> int:
        """Bytes of its parts."""
        return sum(part.nbytes for part in self.parts().values())

    def extra_repr(self) -> str:
        """Its shape."""
        return " x ".join(map(str, self.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001
        """Conversions of PyTorch's move its parts; to another dtype would be another format."""
        dtypes = {name: part.dtype for name, part in self.named_buffers()}
        before: Mapping[str, Tensor] = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            after = self.get_buffer(name)
            if after.dtype != dtype:
                setattr(self, name, before[name].to(after.device))
        return self


Weight = Tensor | QuantizedWeight
"""What a product multiplies with."""


def dequantized(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """A quantized weight as a tensor of `dtype`; a tensor as it is."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)
