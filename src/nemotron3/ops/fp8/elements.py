"""Elements of eight bits: E4M3 (up to 448, three mantissa bits) and E5M2 (up to 57344, two)."""

from typing import Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from nemotron3.ops.minifloat import E4M3, E5M2, Minifloat, nearest, stochastic
from nemotron3.ops.rounding.noise import Placed, uniform

Element = Literal["e4m3", "e5m2"]
FORMATS: dict[str, Minifloat] = {"e4m3": E4M3, "e5m2": E5M2}
DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def check_element(operation: str, element: str) -> None:
    """Refuse a name that is none of the formats."""
    if element not in FORMATS:
        raise ValueError(f"{operation}: element is {element!r}; choose from {', '.join(FORMATS)}")


def rounded_reference(
    x: Float32[Tensor, "*axes column"], element: Element, noise: Placed | None
) -> Tensor:
    """`x` in the element's dtype; what is beyond its range, infinities too, is its largest."""
    of = FORMATS[element]
    codes = nearest(x, of) if noise is None else stochastic(x, of, uniform(x.shape, noise))
    return codes.view(DTYPES[element])


def rounded_torch(
    x: Float32[Tensor, "*axes column"], element: Element, noise: Placed | None
) -> Tensor:
    """As `rounded_reference`, to nearest with PyTorch's conversion."""
    if noise is not None:
        return rounded_reference(x, element, noise)
    most = FORMATS[element].largest
    return x.clamp(-most, most).to(DTYPES[element])
