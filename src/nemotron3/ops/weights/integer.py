"""Weights whose products may round their activations to int8: products of integers.

An element of such a format is a small integer times a scale. With activations in int8, 16 inputs to
a scale, a product is one of integers for each block of 16, which processors compute several times
as fast as one of floats; the sums of blocks are float32. vLLM and torchao call it dynamic
quantization of activations, W4A8 and W8A8. Their scales are for a whole token; those of 16 inputs,
NVFP4's own blocks, cost nothing here and round less: an outlier takes the precision of its own
block only.

It is chosen for a model that is run (`EngineConfig.activations`), never read from a file, and has
no gradients. Rounding is the same for any number of rows, so a token's products do not depend on
its batch.
"""

from abc import ABC, abstractmethod
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int8
from torch import Tensor
from torch.nn import functional as F

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.backends import Implementations, Kernel
from nemotron3.ops.weights.quantized import CompiledWeight, QuantizedWeight

BLOCK = 16
"""Inputs that share a scale."""
_MAX_CODE = 127
_LEAST = 2.0**-100
"""A block without a larger magnitude is zero: 127 / 2^-126 would be infinite."""

ActivationFormat = Literal["int8"]

LINEAR: Implementations = MappingProxyType(
    {
        "reference": Kernel("nemotron3.ops.linear.int8_activations", "linear_int8_reference"),
        "torch": Kernel("nemotron3.ops.linear.int8_activations", "linear_int8_torch"),
        "native": Kernel("nemotron3.ops.linear.native", "linear_quantized_native", native.FLOATS),
    }
)
"""Products with rounded activations."""
EXPERTS: Implementations = MappingProxyType(
    {
        "reference": Kernel(
            "nemotron3.ops.experts.by_expert", "routed_experts_by_expert_reference"
        ),
        "torch": Kernel("nemotron3.ops.experts.by_expert", "routed_experts_by_expert_torch"),
        "native": Kernel(
            "nemotron3.ops.experts.native", "routed_experts_quantized_native", native.FLOATS
        ),
    }
)
"""Routed experts whose products round their activations, the hidden units included."""


class IntegerWeight(CompiledWeight, ABC):
    """A format of integers and scales."""

    @abstractmethod
    def integers(self) -> tuple[Int8[Tensor, "*rows d_in"], Float[Tensor, "*rows blocks"]]:
        """Integers, and the float32 scale of each `BLOCK` of them; the last block may be short."""

    def with_activations(self, activations: ActivationFormat | None) -> Self:
        """This weight in the same memory, with products that round their activations, or do not."""
        return products_in(self[...], activations)


def products_in(weight: Any, activations: ActivationFormat | None) -> Any:
    """A new weight, whose products are made to round their activations, or not to."""
    weight.activations = activations
    return weight


def linear_products(weight: QuantizedWeight) -> Implementations:
    """Implementations of `x W^T` with this weight."""
    return weight.linear if weight.activations is None else LINEAR


def expert_products(weight: QuantizedWeight) -> Implementations:
    """Implementations of routed experts with such weights."""
    return weight.routed_experts if weight.activations is None else EXPERTS


def round_to_int8(
    x: Float[Tensor, "*rows d_in"],
) -> tuple[Int8[Tensor, "*rows d_in"], Float[Tensor, "*rows blocks"]]:
    """Codes from -127 to 127, and the scale of each block: 1/127 of its largest magnitude.

    A block with NaN or an infinity has such a scale, and with it the product of its row. The C++
    products round in the same way, to the bit (ops/native/int8_activations.h).
    """
    width = x.shape[-1]
    blocks = F.pad(x, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < _LEAST, 0.0, _MAX_CODE / largest)
    codes = (blocks * inverse).round().nan_to_num(0).to(torch.int8)
    scales = torch.where(largest < _LEAST, 0.0, largest / _MAX_CODE)
    return codes.flatten(-2)[..., :width], scales.squeeze(-1)


def expanded(scales: Tensor, width: int) -> Tensor:
    """The scales of blocks as those of single inputs."""
    return scales.repeat_interleave(BLOCK, dim=-1)[..., :width]


def rounded_to_int8(x: Tensor) -> Tensor:
    """The values of `round_to_int8`."""
    codes, scales = round_to_int8(x)
    return codes.to(x.dtype) * expanded(scales, x.shape[-1])


def refuse_gradients(operation: str, weight: Any, *operands: Tensor) -> None:
    """Raise OperandError where a product would round activations that need gradients."""
    if not isinstance(weight, QuantizedWeight) or weight.activations is None:
        return
    if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
        raise OperandError(
            f"{operation}: an operand needs gradients, and the product rounds its activations to "
            f"{weight.activations}; train a model whose activations are not rounded"
        )
