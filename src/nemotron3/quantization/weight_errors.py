"""What rounding does to each matrix: bits for an element, and the error of the values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import quantizable_names
from nemotron3.ops.weights import QuantizedWeight, WeightFormat

_PART = 1 << 22
"""Elements of which a sum has float64 copies at a time."""


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """A matrix, or all experts of a layer."""

    name: str
    format: str
    """The number format, or the dtype of a plain matrix."""
    elements: int
    bits_per_element: float
    """Codes and scales in the files."""
    relative_error: float
    """|W - Q| / |W|, with the roots of sums of squares."""
    squared_error: float
    squared_norm: float
    worst_expert: int | None
    """The expert with the largest relative error; None for a single matrix."""
    worst_expert_error: float | None


@torch.no_grad()
def matrix_reports(
    model: LanguageModel, quantized: LanguageModel, formats: Mapping[str, WeightFormat]
) -> list[MatrixReport]:
    """Every matrix that may have a number format, in the order of the model."""
    return [_report(model, quantized, name, formats) for name in quantizable_names(model)]


def total_bits(model: LanguageModel) -> tuple[float, int]:
    """Bits per element of all parameters of a model in its files, and their number."""
    plain = list(model.parameters())
    quantized = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    stored = sum(t.nbytes for t in plain) + sum(map(stored_bytes, quantized))
    elements = sum(each.shape.numel() for each in (*plain, *quantized))
    return 8 * stored / elements, elements


def _report(
    model: LanguageModel,
    quantized: LanguageModel,
    name: str,
    formats: Mapping[str, WeightFormat],
) -> MatrixReport:
    values = model.get_parameter(name)
    if name not in formats:
        plain = values if values.dim() > 2 else [values]
        return plain_report(name, values, sum(map(squared, plain)))
    weight = quantized.get_submodule(name)
    assert isinstance(weight, QuantizedWeight)
    matrices = [(values, weight)] if values.dim() == 2 else zip(values, weight, strict=True)
    return quantized_report(name, weight, [squares(matrix, own) for matrix, own in matrices])


def plain_report(name: str, values: Tensor, squared_norm: float) -> MatrixReport:
    """Of a matrix that stays as it is, of which only shape and dtype are read."""
    return MatrixReport(
        name=name,
        format=str(values.dtype).removeprefix("torch."),
        elements=values.numel(),
        bits_per_element=8.0 * values.itemsize,
        relative_error=0.0,
        squared_error=0.0,
        squared_norm=squared_norm,
        worst_expert=None,
        worst_expert_error=None,
    )


def quantized_report(
    name: str, weight: QuantizedWeight, pairs: Sequence[tuple[float, float]]
) -> MatrixReport:
    """Of a quantized matrix, or of experts, from `squares` of each; `weight` may be on meta."""
    elements = weight.shape.numel()
    errors = [(error / norm) ** 0.5 if norm else 0.0 for error, norm in pairs]
    error, norm = sum(e for e, _ in pairs), sum(n for _, n in pairs)
    worst = max(range(len(errors)), key=errors.__getitem__) if len(weight.shape) > 2 else None
    return MatrixReport(
        name=name,
        format=weight.format,
        elements=elements,
        bits_per_element=8 * stored_bytes(weight) / elements,
        relative_error=(error / norm) ** 0.5 if norm else 0.0,
        squared_error=error,
        squared_norm=norm,
        worst_expert=worst,
        worst_expert_error=None if worst is None else errors[worst],
    )


def squares(matrix: Tensor, weight: QuantizedWeight) -> tuple[float, float]:
    """Squared error and squared norm of a matrix."""
    wide = matrix.float()
    return squared(wide - weight.dequantize()), squared(wide)


def stored_bytes(weight: QuantizedWeight) -> int:
    """Bytes in a file; in memory each row holds the scale of its matrix."""
    matrices = [weight] if len(weight.shape) == 2 else list(weight)
    return sum(part.nbytes for matrix in matrices for part in matrix.parts().values())


def squared(values: Tensor) -> float:
    """The sum of squares, in float64, of which only a part of the matrix is at a time."""
    parts = values.reshape(-1).split(_PART)
    return sum(part.double().square().sum().item() for part in parts)
