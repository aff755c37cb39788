"""The number formats of a directory's tensors, and the matrices of a model that they belong to."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from torch import nn

from nemotron3.checkpoint.safetensors import ShardedReader
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface.companions import Companions, read_json
from nemotron3.models.huggingface.directory import dialect_of_fields, dialect_to_write, read_fields
from nemotron3.models.huggingface.modelopt import (
    HF_QUANT_CONFIG,
    StoredQuantization,
    detected_formats,
    read_quantization,
)
from nemotron3.models.parameter import name_of_formats, quantizable_names, use_weight_format


def published_weights(
    model: nn.Module, config: ModelConfig, companions: Companions | None
) -> dict[str, list[str]]:
    """The published names of each matrix that may be quantized, one for each expert in order."""
    dialect = dialect_to_write(model, config, companions)
    ours = {dialect.published_product(name): name for name in quantizable_names(model)}
    found: dict[str, list[str]] = {}
    for name, _ in dialect.published_views(model, config):
        if (parameter := ours.get(dialect.product_of(name))) is not None:
            found.setdefault(parameter, []).append(name)
    return found


def stored_key_scales(
    model: nn.Module, companions: Companions | None
) -> tuple[tuple[float, float], ...]:
    """The scales of keys and values in a model's directory, those of the MTP block last; or ()."""
    if companions is None or companions.quantization is None:
        return ()
    dialect = dialect_of_fields(companions.fields)
    keys = (name for name, _ in model.named_modules() if name.endswith(".k_proj"))
    layers = [dialect.published_product(name).removesuffix(".k_proj") for name in keys]
    return companions.quantization.key_scales(layers)


def use_stored_formats(
    model: nn.Module, path: Path | str, weights: str | Mapping[str, str] | None
) -> StoredQuantization | None:
    """Give the matrices of a model on the meta device their number formats.

    They are those of a directory's tensors. Plain tensors are quantized to `weights` as they are
    read, which is a format or formats by the names of parameters. Returns what else belongs to the
    stored formats. Raises ConfigError for formats that a model cannot have.
    """
    dialect, _, record = read_fields(path)
    reader = ShardedReader(path)
    stored = {dialect.our_spelling(name): name for name in reader.names}
    file = Path(path) / HF_QUANT_CONFIG
    described = read_json(file) if file.is_file() else None
    found = read_quantization(reader, stored, record, described)
    if found is None or not found.formats:
        if weights is not None:
            use_weight_format(model, weights)
        return found
    held = name_of_formats(found.formats.values())
    if weights is not None and weights != held:
        raise ConfigError(
            f"is {weights!r}, and {path} holds {held} weights, which are read as they are; take "
            "the plain model to quantize it",
            field="weights",
        )
    use_weight_format(model, _formats_of_parameters(model, dialect, stored, found.formats, path))
    return found


def _formats_of_parameters(
    model: nn.Module,
    dialect: ModuleType,
    stored: Mapping[str, str],
    formats: Mapping[str, str],
    path: Path | str,
) -> dict[str, str]:
    """Formats by our names of parameters, of which the experts of a layer are one."""
    ours = {dialect.published_product(name): name for name in quantizable_names(model)}
    found: dict[str, dict[str, str]] = {}
    for name in stored:
        parameter = ours.get(dialect.product_of(name))
        if parameter is not None:
            # Both matrices of the experts are multiplied by one kernel.
            group = parameter.rpartition(".")[0] if ".experts." in parameter else parameter
            found.setdefault(group, {}).setdefault(formats.get(name, "plain"), name)
        elif name in formats:
            raise CheckpointError(
                f"{path}: {stored[name]!r} is stored in {formats[name]}, which is for matrices of "
                "products; this tensor has to be plain"
            )
    for group, names in found.items():
        if len(names) > 1:
            (one, first), (other, second), *_ = names.items()
            raise CheckpointError(
                f"{path}: {first!r} is {one} and {second!r} {other}; the experts of a layer "
                f"({group}) have to be in one format"
            )
    return {
        parameter: kind
        for parameter in ours.values()
        for kind in found.get(parameter, found.get(parameter.rpartition(".")[0], ()))
        if kind != "plain"
    }


def stored_weight_format(path: Path | str) -> str | None:
    """The number format of a directory's weights, "mixed" for several; None if they are plain."""
    dialect, *_ = read_fields(path)
    reader = ShardedReader(path)
    stored = {dialect.our_spelling(name): name for name in reader.names}
    return name_of_formats(detected_formats(reader, stored).values())
