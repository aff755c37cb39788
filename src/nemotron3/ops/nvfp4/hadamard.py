"""The random Hadamard transform of blocks of 16 elements, or of another power of two.

It spreads an outlier over its block: y = (x * signs) H, where H is Sylvester's matrix divided by
the root of its size. H is orthogonal, and signs square to one, so the product of two matrices that
are both transformed along the axis of the sum stays what it is.
"""

import torch
from jaxtyping import Float
from torch import Tensor

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Transformer Engine's sign vector: drawn once, the same in every layer and step."""


def hadamard(
    x: Float[Tensor, "*axes d"], signs: Float[Tensor, " block"]
) -> Float[Tensor, "*axes d"]:
    """Transform each block along the last axis; a block has as many elements as there are signs.

    Rounds of sums and differences of pairs, the same additions on every backend.
    """
    size = len(signs)
    y = x.unflatten(-1, (-1, size)) * (signs * size**-0.5)
    distance = 1
    while distance < size:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        distance *= 2
    return y.flatten(-2)
