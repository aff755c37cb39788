"""A weight that is computed from others where a product needs it."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nemotron3.ops.weights.low_rank import LowRankWeight


class ComputedWeight(nn.Module, ABC):
    """A matrix [out, in], or one for each expert, as a function of other tensors.

    Like a `QuantizedWeight` it stands in a module where the parameter would. Products take its
    operand, with gradients for what it is computed from.
    """

    def operand(self, dtype: torch.dtype) -> Tensor | LowRankWeight:
        """What products multiply with: the value, or parts of it."""
        return self.value(dtype)

    @abstractmethod
    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, or matrices, rounded to `dtype` once; None for float32 at least."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Of the value."""
