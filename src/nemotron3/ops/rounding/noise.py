"""Noise for the stochastic rounding of training: a function of what is rounded, not of when.

A tensor of a training step is named by seed, step, layer and role, an element in it by its row and
column in the whole tensor. That fixes its random bits. So a resumed run, a shard, another
order of experts or another number of processes rounds every element alike.
"""

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor

from nemotron3.ops.counter_random import stream_key
from nemotron3.ops.rounding.bits import RandomBits

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
