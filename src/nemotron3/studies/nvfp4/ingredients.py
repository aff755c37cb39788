"""Error and bias of each ingredient by itself, on matrices that nobody trained.

Rounding is repeated with other noise. The error is the mean over repetitions of the squared
difference to the matrix, relative to the matrix's square. The bias is that of the mean over
repetitions; it is estimated without its own noise, by the product of the differences of two halves,
so it may be a little below 0. To nearest both are the same: nothing is random. No matrix has a
zero, so every zero that is found was made by rounding.

Where the operand is rotated, the rotation is taken back before the comparison.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron3.ops.low_precision import OperandFormat
from nemotron3.ops.nvfp4 import SIGNS, hadamard, random_signs
from nemotron3.ops.rounding import Noise

_SIZE = 128
_GROUP = 128
"""Elements that MS-EDEN rotates together in a row of `_SIZE`."""
REPETITIONS = 16
"""Even, so that there are two halves."""

INGREDIENTS: Mapping[str, OperandFormat] = {
    "blocks of 16, nearest": OperandFormat(),
    "16 x 16, nearest": OperandFormat(blocks="tiles"),
    "blocks of 16, four-over-six": OperandFormat(scales="four_over_six"),
    "blocks of 16, Hadamard, nearest": OperandFormat(hadamard=True),
    "blocks of 16, stochastic": OperandFormat(rounding="stochastic"),
    "blocks of 16, Hadamard, stochastic": OperandFormat(rounding="stochastic", hadamard=True),
    "MS-EDEN": OperandFormat(rounding="ms_eden"),
    "MXFP8": OperandFormat(element="mxfp8"),
}


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How far one ingredient is from what it rounds."""

    ingredient: str
    matrix: str
    """The kind of matrix."""
    error: float
    """Relative squared error of one rounding."""
    bias: float
    """Relative squared error of the mean over noise."""
    flushed: float
    """Share of values that became zero; of a rotated operand, in its rotated basis."""


def matrices() -> dict[str, Tensor]:
    """Kinds of matrices that are rounded: [_SIZE, _SIZE], the same in every process."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(_SIZE, _SIZE, generator=generator)
    # Student's t with three degrees of freedom.
    squares = torch.randn(3, _SIZE, _SIZE, generator=generator).square().mean(0)
    heavy = torch.randn(_SIZE, _SIZE, generator=generator) / squares.sqrt()
    rows = normal * torch.exp(2 * torch.randn(_SIZE, 1, generator=generator))
    return {"normal": normal, "heavy-tailed": heavy, "rows of other sizes": rows}


def measure_roundings(repetitions: int = REPETITIONS) -> list[Rounding]:
    """Every ingredient on every kind of matrix; seconds."""
    return [
        measure_rounding(name, kind, x, repetitions)
        for name in INGREDIENTS
        for kind, x in matrices().items()
    ]


def measure_rounding(name: str, kind: str, x: Tensor, repetitions: int = REPETITIONS) -> Rounding:
    """One ingredient on one matrix; an even number of repetitions."""
    format_ = INGREDIENTS[name]
    size = x.double().square().sum()
    count = repetitions if format_.is_random else 2
    errors: list[Tensor] = []
    zeros: list[Tensor] = []
    halves = [torch.zeros_like(x, dtype=torch.float64) for _ in range(2)]
    for number in range(count):
        found, own = _rounded(x, format_, number)
        zeros.append((found == 0).float().mean())
        difference = own.double() - x.double()
        errors.append(difference.square().sum() / size)
        halves[number % 2] += difference / (count // 2)
    return Rounding(
        ingredient=name,
        matrix=kind,
        error=float(torch.stack(errors).mean()),
        bias=float((halves[0] * halves[1]).sum() / size),
        flushed=float(torch.stack(zeros).mean()),
    )


def _rounded(x: Tensor, format_: OperandFormat, number: int) -> tuple[Tensor, Tensor]:
    """`x` in a format, as it is multiplied and in its own basis; blocks lie along its rows."""
    noise = signs = None
    if format_.is_random:
        noise = Noise(seed=number, step=0, layer=0, role="study values")
        signs = Noise(seed=number, step=0, layer=0, role="study signs")
    found = format_.values(x.T.contiguous(), "columns", noise=noise, signs=signs).T
    if format_.rounding == "ms_eden":
        assert signs is not None
        return found, _back(found, random_signs(signs, _GROUP, x.device))
    if format_.hadamard:
        return found, _back(found, torch.tensor(SIGNS, dtype=torch.float32))
    return found, found


def _back(rotated: Tensor, signs: Tensor) -> Tensor:
    """The transform is its own inverse, with the signs applied afterwards."""
    turned = hadamard(rotated, torch.ones_like(signs))
    return turned * signs.repeat(math.ceil(rotated.shape[-1] / len(signs)))
