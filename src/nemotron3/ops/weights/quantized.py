"""The interface between products and a weight in a narrower number format.

A weight is a tensor or a `QuantizedWeight`, which holds its codes and scales as buffers and takes
the place of the parameter in a module. It names the kernels that multiply with it, so that no
operation depends on a format, and its leading axes (an expert, some rows) can be indexed like a
tensor's. It is frozen: products have gradients with respect to their input only.

The kernels of this class dequantize whole weights first, on every backend. A format is complete
with `empty`, `dequantize`, `copy_`, `parts` and `load_part`; kernels of its own make it faster.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.backends import Implementations, Kernel

_LINEAR = "nemotron3.ops.linear.dequantized"
_EXPERTS = "nemotron3.ops.experts.dequantized"


class QuantizedWeight(nn.Module, ABC):
    """A matrix [out, in], or one for each expert, in a number format of its own."""

    format: str
    """The format's name in options and in config.json."""
    block: ClassVar[int] = 1
    """Inputs that share a scale; it divides their number."""
    activations: Literal["int8"] | None = None
    """What products round their activations to (integer.py); None for nothing."""
    linear: ClassVar[Implementations] = MappingProxyType(
        {
            "reference": Kernel(_LINEAR, "linear_dequantized_reference"),
            "torch": Kernel(_LINEAR, "linear_dequantized_torch"),
        }
    )
    """Implementations of `x W^T`, with operands (x, weight)."""
    routed_experts: ClassVar[Implementations] = MappingProxyType(
        {
            "reference": Kernel(_EXPERTS, "routed_experts_dequantized_reference"),
            "torch": Kernel(_EXPERTS, "routed_experts_dequantized_torch"),
            "native": Kernel(_EXPERTS, "routed_experts_dequantized_native", native.FLOATS),
            "triton": Kernel(_EXPERTS, "routed_experts_dequantized_triton"),
        }
    )
    """Implementations of routed experts, with the operands of `ops.experts.routed_experts`."""

    @classmethod
    @abstractmethod
    def empty(cls, shape: torch.Size) -> Self:
        """An uninitialized weight of this shape, on PyTorch's default device."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the dequantized weight."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dequantized weight, computed in float32 at least and then rounded to `dtype`."""

    @abstractmethod
    def copy_(self, values: "Weight") -> Self:
        """Copy the values of a tensor, quantizing them, or of another weight of this format."""

    @abstractmethod
    def parts(self) -> dict[str, Tensor]:
        """The tensors of a matrix in a file, by names that take the place of `weight`."""

    @abstractmethod
    def load_part(self, name: str, stored: Tensor) -> None:
        """Copy one of the tensors of `parts` from a file, to the bit."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Self:
        """A view of a part; `index` applies to the axes before the last."""

    def __iter__(self) -> Iterator[Self]:
        """Views of its parts along the first axis."""
        return (self[i] for i in range(self.shape[0]))

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return next(self.buffers()).device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @classmethod
    def check_shape(cls, shape: torch.Size) -> None:
        """Raise OperandError for a number of inputs that the format cannot express."""
        if shape[-1] % cls.block:
            raise OperandError(
                f"{cls.format}: {shape[-1]} inputs are not divisible by {cls.block}, and a scale "
                f"is for {cls.block} of them; keep this matrix plain, or in another format"
            )

    def extra_repr(self) -> str:
        """The shape, for `repr`."""
        return " x ".join(map(str, self.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001
        """Let `.to` and the like move the tensors but keep their dtypes, which the format fixes."""
        dtypes = {name: part.dtype for name, part in self.named_buffers()}
        before: Mapping[str, Tensor] = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, dtype in dtypes.items():
            after = self.get_buffer(name)
            if after.dtype != dtype:
                setattr(self, name, before[name].to(after.device))
        return self


class CompiledWeight(QuantizedWeight, ABC):
    """A format that compiled operations multiply with as it is stored, without dequantizing it.

    Its buffers are their operands, in this order; ops/linear and ops/experts have a kernel for each
    such format.
    """

    @classmethod
    @abstractmethod
    def over(cls, stored: Mapping[str, Tensor]) -> Self:
        """The weight of the stored `parts` of a matrix, in their memory but for scales of rows.

        Raises OperandError for values that no weight of this format has.
        """

    linear: ClassVar[Implementations] = MappingProxyType(
        {
            **QuantizedWeight.linear,
            "native": Kernel(
                "nemotron3.ops.linear.native", "linear_quantized_native", native.FLOATS
            ),
        }
    )
    routed_experts: ClassVar[Implementations] = MappingProxyType(
        {
            **QuantizedWeight.routed_experts,
            "native": Kernel(
                "nemotron3.ops.experts.native", "routed_experts_quantized_native", native.FLOATS
            ),
        }
    )


Weight = Tensor | QuantizedWeight
"""A weight of a product."""


def dequantized(weight: Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """A quantized weight as a tensor of `dtype`; a tensor is returned unchanged."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)


def finite_matrix(weight: QuantizedWeight, values: Weight) -> Tensor:
    """Values to quantize, in float32 and where `weight` is; OperandError if not all are finite."""
    matrix = values if isinstance(values, Tensor) else values.dequantize()
    matrix = matrix.detach().to(weight.device, torch.float32)
    if not matrix.isfinite().all():
        raise OperandError(
            f"{weight.format}: a weight holds values that are not finite; no scale can express them"
        )
    return matrix


def check_no_nan(weight: QuantizedWeight, stored: Tensor) -> None:
    """Raise OperandError for E4M3 numbers that are NaN: kernels read no such codes.

    NaN is the largest code of either sign, which two reductions find without a copy of the codes:
    loading a model waits for this check.
    """
    codes = stored.view(torch.uint8).flatten()
    if codes.numel() and (codes.view(torch.int8).max() == 0x7F or codes.max() == 0xFF):
        raise OperandError(f"{weight.format}: NaN is stored there; quantize the plain model again")


def one_scale(scales: Tensor) -> Tensor:
    """The scale of a matrix from those of its rows [d_out]; all of them where they differ."""
    is_one = scales.is_meta or bool((scales == scales[:1]).all())
    return scales[0] if is_one else scales


def scale_of_rows(weight: QuantizedWeight, stored: Tensor, like: Tensor) -> Tensor:
    """A stored scale, [], [1] or one for each row, as a scale for each row.

    Raises OperandError for a scale that is negative or not finite.
    """
    for value in stored.flatten().tolist():
        if not 0 <= value < torch.inf:
            raise OperandError(
                f"{weight.format}: a scale is {value}; it must be finite and not negative"
            )
    return (stored.reshape(()) if stored.numel() == 1 else stored).expand_as(like)
