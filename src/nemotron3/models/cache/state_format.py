"""The storage formats of SSM states: from states to the tensors that store them, and back.

float32 and float16 states are stored in one tensor, int8 states in two: codes, and a scale for each
block. Code that copies states (slots, snapshots, drafts) treats the tensors alike.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.models.cache.state import Parts
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.ops.rounding import BLOCK, RandomBits, from_int8, to_float16, to_int8


class StateFormat:
    """Quantizes and dequantizes the SSM states of one layer, which are computed in `dtype`."""

    def __init__(self, precision: StatePrecision, layer: int, dtype: torch.dtype) -> None:
        self.kind: Literal["float32", "float16", "int8"] = precision.ssm
        self.is_narrow = precision.is_narrow
        self.dtype = dtype
        self._bits = None
        if precision.rounding == "stochastic":
            self._bits = RandomBits(precision.seed, layer, precision.philox_rounds)

    def zeros(self, *shape: int, device: torch.device) -> Parts:
        """Stored states of value 0."""
        match self.kind:
            case "float32":
                return (torch.zeros(shape, dtype=self.dtype, device=device),)
            case "float16":
                return (torch.zeros(shape, dtype=torch.float16, device=device),)
            case "int8":
                steps = (*shape[:-1], -(-shape[-1] // BLOCK))
                return (
                    torch.zeros(shape, dtype=torch.int8, device=device),
                    torch.zeros(steps, dtype=torch.float32, device=device),
                )

    def dequantize(self, parts: Parts) -> Float[Tensor, "row head head_dim d_state"]:
        """The states from the tensors that store them."""
        wide = from_int8(*parts) if self.kind == "int8" else parts[0]
        return wide.to(self.dtype)

    def quantize(
        self, states: Float[Tensor, "row head head_dim d_state"], positions: Int[Tensor, " row"]
    ) -> Parts:
        """The tensors that store these states, each after `positions` tokens of its sequence."""
        match self.kind:
            case "float32":
                return (states,)
            case "float16":
                return (to_float16(states, positions, self._bits),)
            case "int8":
                return to_int8(states, positions, self._bits)
