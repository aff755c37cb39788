"""The random Hadamard transform of 16 elements.

It spreads an outlier over its block: y = (x * signs) H, where H is Sylvester's matrix of 16 x 16
divided by 4. H is orthogonal, and signs square to one, so the product of two matrices that are
both transformed along the axis of the sum stays what it is.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.ops.nvfp4.tensor import BLOCK

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Transformer Engine's sign vector: drawn once, the same in every layer and step."""


def hadamard(
    x: Float32[Tensor, "*axes d"], signs: Float[Tensor, " 16"]
) -> Float32[Tensor, "*axes d"]:
    """Transform each block of 16 along the last axis.

    Four rounds of sums and differences of pairs, the same additions on every backend.
    """
    y = x.unflatten(-1, (-1, BLOCK)) * (signs * 0.25)
    for distance in (1, 2, 4, 8):
        pairs = y.unflatten(-1, (-1, 2, distance))
        a, b = pairs.unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
    return y.flatten(-2)
