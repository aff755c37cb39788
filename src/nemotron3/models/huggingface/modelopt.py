"""Quantized checkpoints: which tensors a weight consists of, and what is written about them.

The published form is that of NVIDIA ModelOpt. A product `X` has

| format | tensors |
|---|---|
| NVFP4 | `X.weight` uint8 [out, in / 2], `X.weight_scale` E4M3 [out, in / 16], `X.weight_scale_2` |
| FP8 | `X.weight` E4M3 [out, in], `X.weight_scale` |

and may have `X.input_scale`, the scale of its activations; keys and values have `k_proj.k_scale`
and `v_proj.v_scale`. Scales of a whole tensor are float32 of shape [] or [1].
`hf_quant_config.json` and the field `quantization_config` of config.json describe the formats,
often not completely. So the format of each weight is told from its tensors, and the description
only says who wrote them.

Scales of activations, keys and values do not belong to weights. They are kept as they are read, and
written again. Formats of other programs have other arithmetic; they are refused by name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nemotron3.checkpoint.safetensors import ShardedReader
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.ops.weights import FORMATS

QUANTIZATION = "quantization_config"
HF_QUANT_CONFIG = "hf_quant_config.json"
OWN = "nemotron3"
"""`quant_method` of formats that are not ModelOpt's."""
_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION")
_GROUP = 16
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PARTS = {
    torch.uint8: ("nvfp4", {"weight_scale": torch.float8_e4m3fn, "weight_scale_2": torch.float32}),
    torch.float8_e4m3fn: ("fp8", {"weight_scale": torch.float32}),
    torch.int8: ("int8", {"weight_scale": torch.float32}),
}
"""The format of a weight by its dtype, and the scales that it needs."""
_INPUT_SCALE = re.compile(r"(.+\.)input_scale")
_KEY_SCALE = re.compile(r"(.+)\.(k_proj\.k|v_proj\.v)_scale")
_FOREIGN = {
    "weight_packed": "compressed-tensors",
    "weight_global_scale": "compressed-tensors",
    "weight_zero_point": "compressed-tensors",
    "weight_shape": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "weight_scale_inv": "FP8 with a scale for each block (DeepSeek's)",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "pre_quant_scale": "ModelOpt's AWQ or SVDQuant, which scale activations too",
}
"""Last parts of tensors' names that only other formats have."""
_REMEDY = (
    "NVIDIA ModelOpt's NVFP4 and FP8 are read, and mixes of them; take such a checkpoint, or the "
    "plain one and `nemotron3 quantize`"
)


@dataclass(frozen=True, kw_only=True)
class StoredQuantization:
    """What a directory says about its quantized weights, besides their tensors."""

    formats: Mapping[str, str]
    """Number formats by the published names of weights."""
    scales: Mapping[str, Tensor]
    """Scales of activations, keys and values, by the published names of the tensors."""
    vectors: frozenset[str]
    """Scales of whole tensors that are stored as [1] and not as []."""
    config_field: Mapping[str, Any] | None
    """`quantization_config` of config.json."""
    hf_quant_config: Mapping[str, Any] | None
    """The content of hf_quant_config.json."""

    def key_scales(self, layers: Sequence[str]) -> tuple[tuple[float, float], ...]:
        """Scales of keys and values of attention layers, 1 where there is none; () if nowhere.

        `layers` are the published names of the modules that hold `k_proj` and `v_proj`.
        """
        found = {name: float(s) for name, s in self.scales.items() if _KEY_SCALE.fullmatch(name)}
        if not found:
            return ()
        ends = ("k_proj.k_scale", "v_proj.v_scale")
        pairs = ([found.get(f"{layer}.{end}", 1.0) for end in ends] for layer in layers)
        return tuple((keys, values) for keys, values in pairs)


def config_record(fields: Mapping[str, Any], file: Path) -> dict[str, Any] | None:
    """The quantization in config.json; ConfigError if another program's."""
    if fields.get("compression_config"):
        raise _foreign(f"{file}: the weights are quantized", "compressed-tensors")
    found: Any = fields.get(QUANTIZATION)
    if not found:
        return None
    record = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    method = record.get("quant_method", "modelopt" if "quant_algo" in record else None)
    if method == OWN:
        held = record.get("format")
        if held not in FORMATS and held != "mixed":
            raise ConfigError(
                f"is {held!r}; the number formats are {', '.join(FORMATS)}", field="weights"
            )
    elif str(method).lower().startswith("modelopt"):
        _check_algorithms(record, file)
    else:
        raise _foreign(f"{file}: the weights are quantized", str(method))
    return record


def detected_formats(reader: ShardedReader, stored: Mapping[str, str]) -> dict[str, str]:
    """The formats of quantized weights, told from the tensors.

    `stored` are the names in the files by published names. Raises CheckpointError for a weight
    without its scales, and ConfigError for tensors of other formats.
    """
    formats: dict[str, str] = {}
    for name, spelling in stored.items():
        stem, _, last = name.rpartition(".")
        if last in _FOREIGN or ".quant_state." in name:
            where = (
                f"{reader.info(spelling).file}: tensor {spelling!r} is of a model that is quantized"
            )
            raise _foreign(where, _FOREIGN.get(last, "bitsandbytes"))
        dtype = reader.info(spelling).dtype
        if last == "weight" and dtype in _PARTS:
            formats[name] = _checked_format(reader, stored, f"{stem}.", spelling)
    return formats


def read_quantization(
    reader: ShardedReader,
    stored: Mapping[str, str],
    record: Mapping[str, Any] | None,
    described: Mapping[str, Any] | None,
) -> StoredQuantization | None:
    """What a directory holds besides plain tensors; None if it holds nothing else.

    `record` is its `quantization_config`, `described` the content of its hf_quant_config.json.
    """
    if described is not None:
        _check_algorithms(described.get("quantization") or {}, reader.directory / HF_QUANT_CONFIG)
    formats = detected_formats(reader, stored)
    names = [name for name in stored if _is_side_scale(name, formats, stored)]
    if not formats and not names:
        return None
    wanted = {stored[name]: name for name in names}
    # Copies: a view would keep the whole file mapped.
    scales = {wanted[name]: scale.clone() for name, scale in reader.tensors(wanted)}
    for name, scale in scales.items():
        if scale.numel() != 1 or not scale.is_floating_point():
            raise CheckpointError(
                f"{reader.info(stored[name]).file}: {stored[name]!r} has shape "
                f"{tuple(scale.shape)} and dtype {scale.dtype}; a scale is one number"
            )
    vectors = {
        name
        for name, spelling in stored.items()
        if reader.info(spelling).shape == (1,) and name.endswith(("_scale", "_scale_2"))
    }
    return StoredQuantization(
        formats=formats,
        scales=scales,
        vectors=frozenset(vectors),
        config_field=record,
        hf_quant_config=described,
    )


def descriptions(
    formats: Mapping[str, str], plain: Iterable[str], scales: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`quantization_config`, and the content of hf_quant_config.json.

    `formats` are by the published names of weights, `plain` are the names of all other matrices.
    Formats that ModelOpt does not have are described by a record of this package alone.
    """
    kinds = set(formats.values())
    if "int8" in kinds:
        return {"quant_method": OWN, "format": kinds.pop() if len(kinds) == 1 else "mixed"}, None
    layers = {
        name.removesuffix(".weight"): _layer_record(name, kind, scales)
        for name, kind in formats.items()
    }
    algorithms = {record["quant_algo"] for record in layers.values()}
    algorithm = algorithms.pop() if len(algorithms) == 1 else "MIXED_PRECISION"
    key_algorithm = "FP8" if any(map(_KEY_SCALE.fullmatch, scales)) else None
    ignored = sorted(name.removesuffix(".weight") for name in plain)
    described: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": key_algorithm}
    if "nvfp4" in kinds:
        described["group_size"] = _GROUP
    described["exclude_modules"] = ignored
    field: dict[str, Any] = {"config_groups": _groups(layers, algorithm), "ignore": ignored}
    if algorithm == "MIXED_PRECISION":
        described["quantized_layers"] = field["quantized_layers"] = layers
    field["quant_algo"] = algorithm
    if key_algorithm:
        field["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    producer = {"name": OWN}
    field |= {"producer": producer, "quant_method": "modelopt"}
    return field, {"producer": producer, "quantization": described}


def scales_to_write(
    found: StoredQuantization | None, formats: Mapping[str, str]
) -> dict[str, Tensor]:
    """The scales besides those of weights, of all products that still have a number format."""
    if found is None:
        return {}
    return {
        name: scale
        for name, scale in found.scales.items()
        if (match := _INPUT_SCALE.fullmatch(name)) is None or f"{match[1]}weight" in formats
    }


def _layer_record(name: str, kind: str, scales: Mapping[str, Tensor]) -> dict[str, Any]:
    if kind == "fp8":
        return {"quant_algo": "FP8"}
    has_inputs = name.removesuffix("weight") + "input_scale" in scales
    return {"quant_algo": "NVFP4" if has_inputs else "W4A16_NVFP4", "group_size": _GROUP}


def _groups(layers: Mapping[str, dict[str, Any]], algorithm: str) -> dict[str, Any]:
    """The products of each format, with the description of its numbers."""
    targets: dict[str, list[str]] = {}
    for name, record in layers.items():
        targets.setdefault(record["quant_algo"], []).append(name)
    groups: dict[str, Any] = {}
    for index, (kind, names) in enumerate(targets.items()):
        numbers: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
        if kind != "FP8":
            numbers |= {"num_bits": 4, "group_size": _GROUP}
        group: dict[str, Any] = {"weights": numbers}
        if kind != "W4A16_NVFP4":
            group["input_activations"] = dict(numbers)
        group["targets"] = sorted(names) if algorithm == "MIXED_PRECISION" else ["Linear"]
        groups[f"group_{index}"] = group
    return groups


def _checked_format(
    reader: ShardedReader, stored: Mapping[str, str], stem: str, spelling: str
) -> str:
    info = reader.info(spelling)
    kind, needed = _PARTS[info.dtype]
    for part, dtype in needed.items():
        if stem + part not in stored:
            raise CheckpointError(
                f"{info.file}: tensor {spelling!r} is stored as {info.dtype}, and its scale "
                f"{spelling.removesuffix('weight') + part!r} is missing; without it the values are "
                "unknown, so fetch or export the checkpoint again"
            )
        scale = reader.info(stored[stem + part])
        if scale.dtype != dtype:
            raise CheckpointError(
                f"{scale.file}: tensor {stored[stem + part]!r} is stored as {scale.dtype}; a "
                f"weight of {info.dtype} in {kind} needs {dtype} there. {_REMEDY}"
            )
    rows = info.shape[:1]
    last = reader.info(stored[stem + part])
    if last.shape not in ((), (1,), rows):
        raise CheckpointError(
            f"{last.file}: tensor {stored[stem + part]!r} has shape {last.shape}; {kind} has one "
            f"scale for a matrix, of shape () or (1,), and none for its blocks. {_REMEDY}"
        )
    return kind


def _is_side_scale(name: str, formats: Mapping[str, str], stored: Mapping[str, str]) -> bool:
    if match := _INPUT_SCALE.fullmatch(name):
        return f"{match[1]}weight" in formats
    if match := _KEY_SCALE.fullmatch(name):
        return f"{match[1]}.{match[2][:-2]}.weight" in stored
    return False


def _check_algorithms(record: Mapping[str, Any], file: Path) -> None:
    layers: dict[str, Any] = record.get("quantized_layers") or {}
    named = {"quant_algo": record.get("quant_algo")} | {
        f"quant_algo of {name}": layer.get("quant_algo")
        for name, layer in layers.items()
        if isinstance(layer, dict)
    }
    for name, algorithm in named.items():
        if algorithm is not None and str(algorithm).upper() not in _ALGORITHMS:
            raise ConfigError(
                f"{file}: {name} is {algorithm!r}; readable are {', '.join(_ALGORITHMS)}. {_REMEDY}"
            )


def _foreign(what: str, program: str) -> ConfigError:
    return ConfigError(f"{what} by {program}. {_REMEDY}")
