"""Model directories in the published layout: config.json, generation_config.json, safetensors.

A dialect lists every tensor of the checkpoint under its published name as a view of the model's own
tensor. Writing streams the views; reading copies into them. Names and shapes are compared before
the model gets its memory, so a missing, extra or mis-shaped tensor is an error that names it and
costs no time.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nemotron3.checkpoint.safetensors import ShardedReader, ShardedWriter
from nemotron3.errors import CheckpointError, ConfigError, OperandError
from nemotron3.models.allocation import allocate
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface import native, nemotron_h, qwen3_moe
from nemotron3.models.huggingface.companions import (
    CONFIG_FILE,
    Companions,
    read_companions,
    read_json,
    write_companions,
    write_json,
)
from nemotron3.models.huggingface.fields import Fields, updated
from nemotron3.models.parameter import parameter_specs, weight_format
from nemotron3.ops.weights import Weight

_DIALECTS: tuple[ModuleType, ...] = (nemotron_h, qwen3_moe, native)
"""In order of preference for writing; the last one can express every model."""
_QUANTIZATION = "quantization_config"
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")


def read_config(path: Path | str, config_class: type[ModelConfig] = ModelConfig) -> ModelConfig:
    """The configuration of a model directory; `config_class` is that of our own layout."""
    return _config_from(*_read_fields(path), config_class)


def _config_from(
    dialect: ModuleType, fields: Fields, config_class: type[ModelConfig]
) -> ModelConfig:
    if dialect is native:
        return native.config_from(fields, config_class)
    return dialect.config_from(fields)


def read_directory(path: Path | str, config_class: type[ModelConfig] = ModelConfig) -> Companions:
    """The configuration of a model directory, and all other contents except the tensors."""
    dialect, fields = _read_fields(path)
    config = _config_from(dialect, fields, config_class)
    return read_companions(Path(path), config=config, fields=fields.fields)


def write_model(
    model: nn.Module,
    config: ModelConfig,
    path: Path | str,
    *,
    max_shard_bytes: int,
    companions: Companions | None = None,
) -> None:
    """Write config.json, generation_config.json, and the tensors in shards.

    `companions` are the other contents of the directory from which the model was loaded; they are
    written again.
    """
    dialect = _dialect_to_write(model, config, companions)
    dtype = str(model.get_parameter("backbone.embeddings.weight").dtype).removeprefix("torch.")
    weights = weight_format(model)
    views = _in_parts(dialect.published_views(model, config)).items()
    total = sum(tensor.nbytes for _, tensor in views)
    with ShardedWriter(path, max_shard_bytes=max_shard_bytes, total_bytes=total) as writer:
        for name, tensor in views:
            writer.add(name, tensor)
    fields = _fields_to_write(dialect, config, dtype, companions)
    if weights is not None:
        fields[_QUANTIZATION] = {"quant_method": native.MODEL_TYPE, "format": weights}
    write_json(Path(path) / CONFIG_FILE, fields)
    write_companions(Path(path), config, companions)


def dialect_of(
    model: nn.Module, config: ModelConfig, companions: Companions | None = None
) -> ModuleType:
    """The layout that a model was read in, or that it would be written in."""
    if companions is not None:
        return _dialect_of(companions.fields)
    return _dialect_to_write(model, config, companions)


def _dialect_to_write(
    model: nn.Module, config: ModelConfig, companions: Companions | None
) -> ModuleType:
    if weight_format(model) is not None:
        return native  # no published layout has these formats
    if companions is not None and config == companions.config:
        dialect = _dialect_of(companions.fields)
        # A dialect has names for all tensors that were read from it, except Qwen's selection bias.
        if dialect is not qwen3_moe:
            return dialect
    return next(d for d in _DIALECTS if d.unsupported(model, config) is None)


def _fields_to_write(
    dialect: ModuleType, config: ModelConfig, dtype: str, companions: Companions | None
) -> dict[str, Any]:
    after = dialect.config_to(config)
    if companions is None:
        return after | {"dtype": dtype, "torch_dtype": dtype}
    read_in = _dialect_of(companions.fields)
    fields = updated(
        companions.fields,
        before=read_in.config_to(companions.config),
        after=after,
        aliases=read_in.ALIASES,
    )
    if dialect is not read_in:
        fields.pop("auto_map", None)  # code that reads the other layout
    return fields | {name: dtype for name in ("dtype", "torch_dtype") if name in fields}


def read_weights(
    model: nn.Module,
    config: ModelConfig,
    path: Path | str,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    cast_dtype: torch.dtype | None = None,
) -> None:
    """Fill a model on the meta device from a directory, one tensor at a time."""
    files = _opened(model, config, path)
    allocate(model, device, dtype or _stored_dtype(model, config, files), cast_dtype)
    files.copy_to(model, config)


def prepared_weights(model: nn.Module, config: ModelConfig, path: Path | str) -> Callable[[], None]:
    """Compare a directory with an allocated model; returns a function that copies the tensors."""
    files = _opened(model, config, path)
    files.check_values(model, config)
    return lambda: files.copy_to(model, config)


class _Files(NamedTuple):
    """The tensors of a directory, compared with those of a model."""

    dialect: ModuleType
    is_quantized: bool
    """Whether weights are stored as codes and scales."""
    reader: ShardedReader
    stored: dict[str, str]
    """Names in the files, by the names that this package writes."""
    stacked: dict[str, list[tuple[int, str]]]

    def destinations(self, model: nn.Module, config: ModelConfig) -> Mapping[str, Weight]:
        """The tensors to copy into; a plain tensor is quantized if the model's weight is."""
        views = self.dialect.published_views(model, config)
        return _in_parts(views) if self.is_quantized else dict(views)

    def check_values(self, model: nn.Module, config: ModelConfig) -> None:
        """Raise CheckpointError for values that a quantized weight cannot represent."""
        destinations = self.destinations(model, config)
        if all(isinstance(weight, Tensor) for weight in destinations.values()):
            return
        for spelling, name in self.stored.items():
            parts = self.stacked.get(spelling, ((None, spelling),))
            if all(isinstance(destinations[to], Tensor) for _, to in parts):
                continue
            if not self.reader.load(name).isfinite().all():
                raise CheckpointError(
                    f"{self.reader.directory}: {name!r} holds values that are not finite, which "
                    "the model's weight format cannot express"
                )

    def copy_to(self, model: nn.Module, config: ModelConfig) -> None:
        """Copy the files' tensors into the model's, one at a time."""
        destinations = self.destinations(model, config)
        ours = {name: spelling for spelling, name in self.stored.items()}
        with torch.no_grad():
            for name, tensor in self.reader.tensors():
                spelling = ours[name]
                for part, destination in self.stacked.get(spelling, ((None, spelling),)):
                    try:
                        destinations[destination].copy_(tensor if part is None else tensor[part])
                    except OperandError as error:
                        raise CheckpointError(
                            f"{self.reader.directory}: {name!r}: {error}"
                        ) from error


def _opened(model: nn.Module, config: ModelConfig, path: Path | str) -> _Files:
    dialect, _ = _read_fields(path)
    held, weights = weight_format(model), stored_weight_format(path)
    if weights is not None and weights != held:
        raise ConfigError(
            f"{path} holds {weights} weights and the model's are {held or 'plain tensors'}; read "
            "the directory by LanguageModel.from_pretrained and convert the model"
        )
    reader = ShardedReader(path)
    stored = {dialect.our_spelling(name): name for name in reader.names}
    files = _Files(dialect, weights is not None, reader, stored, {})
    shapes = files.destinations(model, config)
    files = files._replace(stacked=_stacked_names(shapes, stored))
    _compare(reader, stored, shapes, files.stacked)
    return files


def _in_parts(views: Iterable[tuple[str, Weight]]) -> dict[str, Tensor]:
    """The tensors in the files: a quantized weight consists of several."""
    parts: dict[str, Tensor] = {}
    for name, weight in views:
        if isinstance(weight, Tensor):
            parts[name] = weight
        else:
            parts |= {name + suffix: part for suffix, part in weight.parts().items()}
    return parts


def stored_weight_format(path: Path | str) -> str | None:
    """The number format of a directory's weights; None if they are plain tensors."""
    quantization = _own_quantization(read_json(Path(path) / CONFIG_FILE))
    return None if quantization is None else quantization.get("format")


def _own_quantization(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    found: Any = fields.get(_QUANTIZATION)
    is_ours = isinstance(found, dict) and found.get("quant_method") == native.MODEL_TYPE
    return found if is_ours else None


def _read_fields(path: Path | str) -> tuple[ModuleType, Fields]:
    """The dialect of config.json, and the language model's fields in it."""
    file = Path(path) / CONFIG_FILE
    fields = read_json(file)
    if _own_quantization(fields) is not None:
        fields = {name: value for name, value in fields.items() if name != _QUANTIZATION}
    quantized = bool(fields.get(_QUANTIZATION))
    for nested in ("llm_config", "text_config"):
        fields = fields.get(nested) or fields
    if quantized or fields.get(_QUANTIZATION):
        raise ConfigError(f"{file}: the checkpoint is quantized, and only plain weights are read")
    model_type = fields.get("model_type")
    known = [dialect.MODEL_TYPE for dialect in _DIALECTS]
    if model_type not in known:
        raise ConfigError(f"{file}: model_type is {model_type!r}; readable are {', '.join(known)}")
    dialect = _dialect_of(fields)
    return dialect, Fields(fields, str(file), dialect.ALIASES)


def _dialect_of(fields: Mapping[str, Any]) -> ModuleType:
    return next(d for d in _DIALECTS if fields["model_type"] == d.MODEL_TYPE)


def _stacked_names(
    shapes: Mapping[str, Weight], stored: dict[str, str]
) -> dict[str, list[tuple[int, str]]]:
    """Tensors of all experts at once, as transformers has them in memory."""
    stacked: dict[str, list[tuple[int, str]]] = {}
    for name in shapes:
        match = _EXPERT.fullmatch(name)
        if match and f"{match[1]}.{match[3]}" in stored:
            stacked.setdefault(f"{match[1]}.{match[3]}", []).append((int(match[2]), name))
    return stacked


def _compare(
    reader: ShardedReader,
    stored: dict[str, str],
    shapes: Mapping[str, Weight],
    stacked: dict[str, list[tuple[int, str]]],
) -> None:
    # Files in other quantized formats have extra and mis-shaped tensors: this error comes first.
    for spelling, name in stored.items():
        info, ours = reader.info(name), shapes.get(spelling)
        if isinstance(ours, Tensor) and not ours.is_floating_point():
            if info.dtype != ours.dtype:
                raise CheckpointError(
                    f"{info.file}: tensor {name!r} is stored as {info.dtype}; the number format "
                    f"in config.json has {ours.dtype} there"
                )
        elif info.dtype not in _READABLE:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is stored as {info.dtype}, a quantized format; only "
                "float32, float16 and bfloat16 weights are read"
            )
    covered = {name for parts in stacked.values() for _, name in parts}
    missing = [name for name in shapes if name not in stored and name not in covered]
    extra = [name for name in stored if name not in shapes and name not in stacked]
    if missing:
        raise CheckpointError(
            f"{reader.directory} lacks {len(missing)} tensors that config.json calls for, first "
            f"{missing[0]!r}; {_why_missing(missing)}"
        )
    if extra:
        raise CheckpointError(
            f"{reader.directory} holds {len(extra)} tensors that config.json does not call for, "
            f"first {stored[extra[0]]!r}; config.json is of another model"
        )
    for spelling, name in stored.items():
        if spelling in stacked:
            parts = stacked[spelling]
            expected = (len(parts), *shapes[parts[0][1]].shape)
        else:
            expected = tuple(shapes[spelling].shape)
        info = reader.info(name)
        if info.shape != expected:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} has shape {info.shape}, but config.json calls for "
                f"{expected}; one of the two is of another model"
            )


def _why_missing(names: list[str]) -> str:
    if all(name.startswith("mtp.") for name in names):
        return (
            "Hugging Face transformers drops the multi-token-prediction block on saving; take the "
            "original files, or set num_nextn_predict_layers to 0 to do without it"
        )
    return "the download is incomplete or config.json is of another model"


def _stored_dtype(model: nn.Module, config: ModelConfig, files: _Files) -> torch.dtype:
    """The dtype of most of the weights; a file may keep single tensors in a wider one."""
    # Dialects have other names of modules, but the same last parts of these names.
    specs = parameter_specs(model)
    wide = tuple({f".{n.rpartition('.')[2]}" for n, spec in specs.items() if spec.keep_float32})
    sizes: Counter[torch.dtype] = Counter()
    views = files.dialect.published_views(model, config) if files.is_quantized else ()
    parts = _in_parts((name, view) for name, view in views if not isinstance(view, Tensor))
    for spelling, name in files.stored.items():
        if not spelling.endswith(wide) and spelling not in parts:
            info = files.reader.info(name)
            sizes[info.dtype] += torch.Size(info.shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
