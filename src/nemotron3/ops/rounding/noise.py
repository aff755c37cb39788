"""Noise for the stochastic rounding of training: a function of what is rounded, not of when.

A tensor of a training step is named by seed, step, layer and role, an element in it by its row and
column in the whole tensor. That fixes its random bits. So a resumed run, a shard, another
order of experts or another number of processes rounds every element alike.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from nemotron3.ops.checks import check_integers
from nemotron3.ops.counter_random import stream_key
from nemotron3.ops.rounding.bits import RandomBits, sixteen_bits

Rounding = Literal["nearest", "stochastic"]

ROUNDS = 7
"""Of Philox: the fewest that pass all tests of randomness of its authors."""
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Noise:
    """The random bits of one tensor, and which part of it is rounded."""

    seed: int
    step: int
    layer: int
    role: str
    """What the tensor is: two tensors of a layer must not share their noise."""
    rows: Int[Tensor, " row"] | None = None
    """The place of each given row in the whole tensor; by default they are counted from 0."""
    first_column: int = 0
    """The place of the first given column."""

    @property
    def bits(self) -> RandomBits:
        """The source of random bits: its key is a hash of seed, step, layer and role."""
        key = stream_key(self.seed, f"{self.step} {self.layer} {self.role}")
        return RandomBits(key & _WORD, key >> 32 & _WORD, ROUNDS)


class Placed(NamedTuple):
    """Random bits, and the rows and columns in the whole tensor that the given part has."""

    bits: RandomBits
    rows: Tensor
    """int64 [row]."""
    first_column: int


COLUMNS = 16
"""The first column of a part is a multiple of this, so that compiled code reads whole vectors."""


def placed(operation: str, rounding: str, noise: Noise | None, x: Tensor) -> Placed | None:
    """The noise of a tensor's rows [..., column]; None to nearest. Raises for a mistake."""
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"{operation}: rounding is {rounding!r}; choose from nearest, stochastic")
    if rounding == "nearest":
        if noise is None:
            return None
        raise ValueError(
            f"{operation}: rounding is 'nearest', which uses no noise; leave noise out"
        )
    if noise is None:
        raise ValueError(
            f"{operation}: rounding is 'stochastic' and noise is None; pass noise=Noise(seed, "
            "step, layer, role) of nemotron3.ops.rounding"
        )
    if noise.first_column % COLUMNS or noise.first_column < 0:
        raise ValueError(
            f"{operation}: first_column of noise is {noise.first_column}; expected a multiple of "
            f"{COLUMNS}"
        )
    rows = x.shape[:-1].numel()
    if noise.rows is None:
        places = torch.arange(rows, device=x.device)
    else:
        places = check_integers(operation, "rows of noise", noise.rows, (rows,), x)
    return Placed(noise.bits, places, noise.first_column)


def uniform(shape: torch.Size, noise: Placed) -> Float32[Tensor, "*axes column"]:
    """Uniform numbers in (0, 1), odd multiples of 2^-17, for each element."""
    end = noise.first_column + shape[-1]
    random = sixteen_bits(end, noise.rows, noise.bits)[:, noise.first_column :]
    return ((random.float() + 0.5) * 2.0**-16).view(shape)
