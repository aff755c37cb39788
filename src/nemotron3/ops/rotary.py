"""Rotary position embedding (Su et al., arXiv 2104.09864), which pairs the two halves of a head.

Only the comparison models use them. There is one implementation: it is its own reference.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.checks import check_axes, check_divides, check_integers


def rotate(
    x: Float[Tensor, "tokens head head_dim"], positions: Int[Tensor, " tokens"], theta: float
) -> Float[Tensor, "tokens head head_dim"]:
    """Rotate channel pair (i, i + head_dim / 2) by the angle position * theta^(-2 i / head_dim)."""
    check_axes("rotate", "x", x, "tokens head head_dim")
    check_divides("rotate", "halves", 2, "head_dim", x.shape[-1])
    positions = check_integers("rotate", "positions", positions, x.shape[:1], x)
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    exponent = torch.arange(half, device=x.device, dtype=wide) / half
    angle = positions.to(wide)[:, None, None] * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(wide).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
