"""Quantizing a directory matrix by matrix, so that the model may be larger than the memory.

Scales of weights depend on nothing but their matrix. The plain matrices are read from the mapped
files one after another, rounded, and written into their places; of the model no more than one
matrix is in memory. What needs the model, scales of activations, a comparison and a search for a
mix, is done on a model in memory (recipes/quantize.py). The files are the same.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nemotron3.errors import CheckpointError, OperandError
from nemotron3.models import huggingface
from nemotron3.models.allocation import allocate
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import quantizable_names, use_weight_format
from nemotron3.ops.nvfp4 import Scales
from nemotron3.ops.weights import QuantizedWeight, Weight, quantize_weight
from nemotron3.quantization.formats import Format, formats_for
from nemotron3.quantization.weight_errors import (
    MatrixReport,
    plain_report,
    quantized_report,
    squared,
    squares,
)

_META = torch.device("meta")


def can_quantize_by_matrix(path: Path, wanted: Format) -> bool:
    """Whether a directory is in the published layout, in which the result is written as well."""
    return wanted != "int8" and huggingface.is_published_layout(path)


class ByMatrix(NamedTuple):
    """A model and its quantized form without memory, and what rounding did to each matrix."""

    model: LanguageModel
    quantized: LanguageModel
    reports: list[MatrixReport]


def quantize_by_matrix(path: Path, out: Path, wanted: Format, *, scales: Scales) -> ByMatrix:
    """Write the directory `out` with the weights of `path` rounded to a format.

    Raises ConfigError, CheckpointError or StorageError before anything is computed, and
    CheckpointError for values that are not finite.
    """
    companions = huggingface.read_directory(path)
    with _META:
        model, quantized = (LanguageModel(companions.config) for _ in range(2))
        formats = formats_for(model, wanted)
        use_weight_format(quantized, formats)
    values, dtype = huggingface.stored_values(model, companions.config, path)
    for each in (model, quantized):
        allocate(each, _META, dtype)
    model.companions = quantized.companions = companions
    pairs: dict[str, tuple[float, float]] = {}
    huggingface.write_weights(
        quantized,
        companions.config,
        out,
        _weights(quantized, values, scales, pairs),
        companions=companions,
    )
    return ByMatrix(model, quantized, _reports(model, quantized, pairs))


@torch.no_grad()
def _weights(
    quantized: LanguageModel,
    values: Mapping[str, Tensor],
    scales: Scales,
    pairs: dict[str, tuple[float, float]],
) -> Iterator[tuple[str, Weight]]:
    """Every weight of the new directory; `pairs` gets its squared error and squared norm."""
    config, companions = quantized.config, quantized.companions
    products = huggingface.published_weights(quantized, config, companions).values()
    reported = {name for names in products for name in names}
    for name, view in huggingface.published_views(quantized, config, companions):
        matrix = values[name]
        if not isinstance(view, QuantizedWeight):
            if name in reported:
                pairs[name] = 0.0, squared(matrix)
            yield name, matrix.to(view.dtype)
            continue
        try:
            weight = quantize_weight(view.format, matrix, scales=scales)
        except OperandError as error:
            raise CheckpointError(f"{name!r} cannot be quantized: {error}") from error
        pairs[name] = squares(matrix, weight)
        yield name, weight


def _reports(
    model: LanguageModel, quantized: LanguageModel, pairs: Mapping[str, tuple[float, float]]
) -> list[MatrixReport]:
    """Every matrix that may have a number format, in the order of the model."""
    published = huggingface.published_weights(model, model.config, model.companions)
    reports: list[MatrixReport] = []
    for name in quantizable_names(model):
        own = [pairs[each] for each in published[name]]
        prefix, _, last = name.rpartition(".")
        weight = getattr(quantized.get_submodule(prefix), last)
        if isinstance(weight, QuantizedWeight):
            reports.append(quantized_report(name, weight, own))
        else:
            reports.append(plain_report(name, weight, sum(norm for _, norm in own)))
    return reports
