"""Model directories in the published layout: config.json, generation_config.json, safetensors.

A dialect lists every tensor of the checkpoint under its published name as a view of the model's own
tensor. Writing streams the views; reading copies into them. A quantized weight is one view, and
several tensors in the files: codes and scales (modelopt.py), which are copied as they are. Names
and shapes are compared before the model gets its memory, so a missing, extra or mis-shaped tensor
is an error that names it and costs no time.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nemotron3.checkpoint.mapping import mapped_tensors
from nemotron3.checkpoint.planned import PlannedWriter
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
from nemotron3.models.huggingface.mapped import READ_AS_STORED, map_matrices
from nemotron3.models.huggingface.modelopt import (
    HF_QUANT_CONFIG,
    QUANTIZATION,
    config_record,
    descriptions,
    read_quantization,
    scales_to_write,
)
from nemotron3.models.parameter import (
    parameter_specs,
    weight_formats,
)
from nemotron3.ops.weights import QuantizedWeight, Weight

_DIALECTS: tuple[ModuleType, ...] = (nemotron_h, qwen3_moe, native)
"""In order of preference for writing; the last one can express every model."""
_READABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")


def read_config(path: Path | str, config_class: type[ModelConfig] = ModelConfig) -> ModelConfig:
    """The configuration of a model directory; `config_class` is that of our own layout."""
    dialect, fields, _ = read_fields(path)
    return _config_from(dialect, fields, config_class)


def _config_from(
    dialect: ModuleType, fields: Fields, config_class: type[ModelConfig]
) -> ModelConfig:
    if dialect is native:
        return native.config_from(fields, config_class)
    return dialect.config_from(fields)


def read_directory(path: Path | str, config_class: type[ModelConfig] = ModelConfig) -> Companions:
    """The configuration of a model directory, and all other contents except the tensors."""
    dialect, fields, _ = read_fields(path)
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
    dialect = dialect_to_write(model, config, companions)
    views = dict(dialect.published_views(model, config))
    read = None if companions is None else companions.quantization
    scales = scales_to_write(read, _formats_of(views))
    vectors: frozenset[str] = frozenset() if read is None else read.vectors
    tensors = [*_in_files(views, vectors), *scales.items()]
    total = sum(tensor.nbytes for _, tensor in tensors)
    with ShardedWriter(path, max_shard_bytes=max_shard_bytes, total_bytes=total) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
    _write_descriptions(model, config, path, dialect, companions)


def write_weights(
    model: nn.Module,
    config: ModelConfig,
    path: Path | str,
    weights: Iterable[tuple[str, Weight]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    companions: Companions | None = None,
) -> None:
    """Write the directory of a model on the meta device, weight by weight as they are computed.

    `weights` has the weight of each of `published_views`, in any order; no more than one of them is
    held. Scales of activations and keys are not written. Raises CheckpointError for a weight that
    is not the model's, or missing.
    """
    dialect = dialect_to_write(model, config, companions)
    plan = dict(_in_files(dict(dialect.published_views(model, config)), frozenset()))
    with PlannedWriter(path, plan, max_shard_bytes=max_shard_bytes) as writer:
        for name, weight in weights:
            for spelling, tensor in _in_files({name: weight}, frozenset()):
                writer.add(spelling, tensor)
    _write_descriptions(model, config, path, dialect, companions)


def published_views(
    model: nn.Module, config: ModelConfig, companions: Companions | None = None
) -> Iterator[tuple[str, Weight]]:
    """The weights of the directory that a model is written to, as views by published names."""
    return dialect_to_write(model, config, companions).published_views(model, config)


def is_published_layout(path: Path | str) -> bool:
    """Whether a directory has the layout of Nemotron 3, and not another one that is read here."""
    return read_fields(path)[0] is nemotron_h


def stored_values(
    model: nn.Module, config: ModelConfig, path: Path | str
) -> tuple[dict[str, Tensor], torch.dtype]:
    """The plain tensors of a directory as views of its mapped files, and the dtype of most.

    They are compared with a model on the meta device, and have its published names.
    """
    files = _opened(model, config, path)
    views = dict(mapped_tensors(files.reader))
    found: dict[str, Tensor] = {}
    for spelling, name in files.stored.items():
        for part, own in files.stacked.get(spelling, ((None, spelling),)):
            found[own] = views[name] if part is None else views[name][part]
    return found, _stored_dtype(model, config, files)


def _formats_of(views: Mapping[str, Weight]) -> dict[str, str]:
    return {n: view.format for n, view in views.items() if isinstance(view, QuantizedWeight)}


def _write_descriptions(
    model: nn.Module,
    config: ModelConfig,
    path: Path | str,
    dialect: ModuleType,
    companions: Companions | None,
) -> None:
    """Write everything but the tensors."""
    dtype = str(model.get_parameter("backbone.embeddings.weight").dtype).removeprefix("torch.")
    fields = _fields_to_write(dialect, config, dtype, companions)
    views = dict(dialect.published_views(model, config))
    formats = _formats_of(views)
    read = None if companions is None else companions.quantization
    described: Mapping[str, Any] | None = None
    if formats:
        if read is not None and read.config_field and read.formats == formats:
            field, described = read.config_field, read.hf_quant_config
        else:
            is_matrix = (n for n, view in views.items() if n not in formats and view.dim() > 1)
            plain = (n for n in is_matrix if "embed" not in n)
            field, described = descriptions(formats, plain, scales_to_write(read, formats))
        fields[QUANTIZATION] = field
    write_json(Path(path) / CONFIG_FILE, fields)
    if described is not None:
        write_json(Path(path) / HF_QUANT_CONFIG, described)
    else:
        (Path(path) / HF_QUANT_CONFIG).unlink(missing_ok=True)
    write_companions(Path(path), config, companions)


def dialect_of(
    model: nn.Module, config: ModelConfig, companions: Companions | None = None
) -> ModuleType:
    """The layout that a model was read in, or that it would be written in."""
    if companions is not None:
        return dialect_of_fields(companions.fields)
    return dialect_to_write(model, config, companions)


def dialect_to_write(
    model: nn.Module, config: ModelConfig, companions: Companions | None
) -> ModuleType:
    """The layout that a model is written in: that of its directory, if it can express the model."""
    if "int8" in weight_formats(model).values():
        return native  # no published layout has this format
    if companions is not None and config == companions.config:
        dialect = dialect_of_fields(companions.fields)
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
    read_in = dialect_of_fields(companions.fields)
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


def map_weights(model: nn.Module, config: ModelConfig, path: Path | str) -> int:
    """Map the matrices of a directory into a model on the meta device, and copy all else.

    Matrices keep their stored dtypes; all else is float32, as activations are. Returns the bytes
    that are mapped.
    """
    files = _opened(model, config, path)
    held = _stored_dtype(model, config, files)
    mapped = map_matrices(model, config, files.dialect, files.reader, files.stored)
    cast_dtype = held if held in READ_AS_STORED else None
    allocate(model, torch.device("cpu"), torch.float32, cast_dtype)
    left = {name: stored for name, stored in files.stored.items() if name not in mapped}
    files._replace(stored=left).copy_to(model, config)
    return sum(files.reader.info(files.stored[name]).num_bytes for name in mapped)


def prepared_weights(model: nn.Module, config: ModelConfig, path: Path | str) -> Callable[[], None]:
    """Compare a directory with an allocated model; returns a function that copies the tensors."""
    files = _opened(model, config, path)
    files.check_values(model, config)
    return lambda: files.copy_to(model, config)


class _Part(NamedTuple):
    """One of the stored tensors of a quantized weight."""

    weight: QuantizedWeight
    name: str

    @property
    def stored(self) -> Tensor:
        """The tensor as it is written."""
        return self.weight.parts()[self.name]

    @property
    def shape(self) -> torch.Size:
        """As it is written."""
        return self.stored.shape

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a stored tensor is this one; the scale of a matrix may have several shapes."""
        if shape == tuple(self.shape):
            return True
        rows = tuple(self.weight.shape[:1])
        return all(s in ((), (1,), rows) for s in (shape, tuple(self.shape)))

    def copy_(self, tensor: Tensor) -> None:
        """Copy the stored tensor."""
        self.weight.load_part(self.name, tensor)


_Destination = Tensor | QuantizedWeight | _Part


class _Files(NamedTuple):
    """The tensors of a directory, compared with those of a model."""

    dialect: ModuleType
    formats: Mapping[str, str]
    """The formats of weights that are stored as codes and scales."""
    reader: ShardedReader
    stored: dict[str, str]
    """Names in the files, by the names that this package writes."""
    stacked: dict[str, list[tuple[int, str]]]

    def destinations(self, model: nn.Module, config: ModelConfig) -> dict[str, _Destination]:
        """What to copy tensors into; a plain tensor is quantized if the model's weight is."""
        found: dict[str, _Destination] = {}
        for name, view in self.dialect.published_views(model, config):
            if isinstance(view, QuantizedWeight) and name in self.formats:
                stem = name.removesuffix("weight")
                found |= {stem + part: _Part(view, part) for part in view.parts()}
            else:
                found[name] = view
        return found

    def check_values(self, model: nn.Module, config: ModelConfig) -> None:
        """Raise CheckpointError for values that a quantized weight cannot represent."""
        destinations = self.destinations(model, config)
        if not any(isinstance(weight, QuantizedWeight) for weight in destinations.values()):
            return
        for spelling, name in self.stored.items():
            parts = self.stacked.get(spelling, ((None, spelling),))
            if not any(isinstance(destinations[to], QuantizedWeight) for _, to in parts):
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
            for name, tensor in self.reader.tensors(ours):
                spelling = ours[name]
                for part, destination in self.stacked.get(spelling, ((None, spelling),)):
                    try:
                        destinations[destination].copy_(tensor if part is None else tensor[part])
                    except OperandError as error:
                        raise CheckpointError(
                            f"{self.reader.directory}: {name!r}: {error}"
                        ) from error


def _opened(model: nn.Module, config: ModelConfig, path: Path | str) -> _Files:
    dialect, _, record = read_fields(path)
    reader = ShardedReader(path)
    stored = {dialect.our_spelling(name): name for name in reader.names}
    quantization = read_quantization(reader, stored, record, None)
    formats = {} if quantization is None else quantization.formats
    for name, view in dialect.published_views(model, config):
        held = view.format if isinstance(view, QuantizedWeight) else "plain"
        if formats.get(name, held) != held:
            raise ConfigError(
                f"{path} holds {name!r} in {formats[name]}, and the model's is {held}; read the "
                "directory by LanguageModel.from_pretrained and convert the model"
            )
    if quantization is not None:
        stored = {name: held for name, held in stored.items() if name not in quantization.scales}
    files = _Files(dialect, formats, reader, stored, {})
    shapes = files.destinations(model, config)
    files = files._replace(stacked=_stacked_names(shapes, stored))
    _compare(reader, stored, shapes, files.stacked)
    return files


def _in_files(views: Mapping[str, Weight], vectors: frozenset[str]) -> list[tuple[str, Tensor]]:
    """The tensors in the files, of which a quantized weight has several.

    `vectors` are the scales that are written as [1].
    """
    found: list[tuple[str, Tensor]] = []
    for name, view in views.items():
        if isinstance(view, Tensor):
            found.append((name, view))
            continue
        for part, tensor in view.parts().items():
            spelling = name.removesuffix("weight") + part
            is_vector = spelling in vectors and tensor.dim() == 0
            found.append((spelling, tensor.reshape(1) if is_vector else tensor))
    return found


def read_fields(path: Path | str) -> tuple[ModuleType, Fields, dict[str, Any] | None]:
    """The dialect of config.json, the language model's fields in it, and the quantization."""
    file = Path(path) / CONFIG_FILE
    fields = read_json(file)
    record = config_record(fields, file)
    for nested in ("llm_config", "text_config"):
        fields = fields.get(nested) or fields
        record = record or config_record(fields, file)
    fields = {name: value for name, value in fields.items() if name != QUANTIZATION}
    model_type = fields.get("model_type")
    known = [dialect.MODEL_TYPE for dialect in _DIALECTS]
    if model_type not in known:
        raise ConfigError(f"{file}: model_type is {model_type!r}; readable are {', '.join(known)}")
    dialect = dialect_of_fields(fields)
    return dialect, Fields(fields, str(file), dialect.ALIASES), record


def dialect_of_fields(fields: Mapping[str, Any]) -> ModuleType:
    """The layout that config.json names."""
    return next(d for d in _DIALECTS if fields["model_type"] == d.MODEL_TYPE)


def _stacked_names(
    shapes: Mapping[str, _Destination], stored: dict[str, str]
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
    shapes: Mapping[str, _Destination],
    stacked: dict[str, list[tuple[int, str]]],
) -> None:
    # Files in other quantized formats have extra and mis-shaped tensors: this error comes first.
    for spelling, name in stored.items():
        info = reader.info(name)
        if not isinstance(shapes.get(spelling), _Part) and info.dtype not in _READABLE:
            raise CheckpointError(
                f"{info.file}: tensor {name!r} is stored as {info.dtype}, a quantized format; only "
                "float32, float16 and bfloat16 are read there"
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
        info = reader.info(name)
        if spelling in stacked:
            parts = stacked[spelling]
            expected = (len(parts), *shapes[parts[0][1]].shape)
        else:
            ours = shapes[spelling]
            expected = tuple(ours.shape)
            if isinstance(ours, _Part) and ours.fits(info.shape):
                continue
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
    kept = (name for name, spec in parameter_specs(model).items() if spec.keep_float32)
    wide = {files.dialect.published_product(name) for name in kept}
    sizes: Counter[torch.dtype] = Counter()
    destinations = files.destinations(model, config)
    for spelling, name in files.stored.items():
        if spelling not in wide and not isinstance(destinations.get(spelling), _Part):
            info = files.reader.info(name)
            sizes[info.dtype] += torch.Size(info.shape).numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
