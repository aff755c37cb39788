"""Replacing the weights of a served model, in the memory of the old ones.

New weights come from a model directory, or as tensors by the names of `model.state_dict()`. Names,
shapes and kinds of dtype, and for a directory its configuration, are compared before anything is
written, so weights that do not fit raise an error and leave the model unchanged. If the model's
weights are quantized, plain ones are quantized when they are written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.lora import has_quantized_base
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import state_tensors
from nemotron3.ops.weights import Weight

Weights = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""A model directory, or tensors by the names of `model.state_dict()` of the plain model."""
RunningRequests = Literal["recompute", "keep"]
"""How running requests continue when weights are replaced: their states are recomputed with the new
weights, or the states of the old weights are kept. Their tokens stay in both cases."""

_RUNNING: tuple[RunningRequests, ...] = ("recompute", "keep")
_NOT_COMPUTED_WITH = {"initializer_range", "max_position_embeddings"}


def prepared_weights(model: LanguageModel, weights: Weights) -> Callable[[], None]:
    """Compare weights with a model; returns a function that writes them into its tensors.

    Raises ConfigError or CheckpointError if they do not fit.
    """
    if has_quantized_base(model):
        raise ConfigError(
            "the model has an adapter beside quantized weights, which new weights cannot replace; "
            "load the new model, with lora=DIR if the adapter is for it"
        )
    if isinstance(weights, str | Path):
        _compare_configs(model, Path(weights))
        return huggingface.prepared_weights(model, model.config, weights)
    named = _by_name(weights)
    targets = dict(state_tensors(model))
    _compare(targets, named)

    def write() -> None:
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(named[name])

    return write


def assert_running(running: str) -> None:
    """Raise ConfigError unless `running` is one of `RunningRequests`."""
    if running not in _RUNNING:
        raise ConfigError(
            f"is {running!r}; it must be one of {', '.join(_RUNNING)}", field="running"
        )


def next_version(current: int, wanted: int | None) -> int:
    """The version of new weights: `wanted`, or the current one plus 1."""
    if wanted is None:
        return current + 1
    if wanted <= current:
        raise ConfigError(
            f"is {wanted}, and the weights have version {current} already; a version must "
            "grow, so that it tells which weights a token came from",
            field="version",
        )
    return wanted


def _by_name(weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    if isinstance(weights, Mapping):
        return dict(cast(Mapping[str, Tensor], weights))
    named: dict[str, Tensor] = {}
    for name, tensor in weights:
        if name in named:
            raise ConfigError(f"weights have {name!r} twice; give each tensor once")
        named[name] = tensor
    return named


def _compare(targets: Mapping[str, Weight], named: Mapping[str, Tensor]) -> None:
    for problem, names in (
        ("lack", targets.keys() - named.keys()),
        ("have more than the model:", named.keys() - targets.keys()),
    ):
        if names:
            raise ConfigError(
                f"weights {problem} {len(names)} tensors, first {min(names)!r}; give exactly those "
                "of model.state_dict()"
            )
    for name, target in targets.items():
        given: Any = named[name]
        if not isinstance(given, Tensor) or given.is_meta:
            raise ConfigError(f"weights[{name!r}] is not a tensor with values; give its values")
        if given.shape != target.shape:
            raise ConfigError(
                f"weights[{name!r}] has shape {tuple(given.shape)} and the model's has "
                f"{tuple(target.shape)}; give weights of the same model"
            )
        dtype = target.dtype if isinstance(target, Tensor) else torch.float32
        if given.dtype.is_floating_point != dtype.is_floating_point:
            raise ConfigError(
                f"weights[{name!r}] has dtype {given.dtype} and the model's has {dtype}; give it "
                "in that dtype"
            )
        if not isinstance(target, Tensor) and not given.isfinite().all():
            raise ConfigError(
                f"weights[{name!r}] has values that are not finite, which {target.format} cannot "
                "represent; give finite values"
            )


def _compare_configs(model: LanguageModel, path: Path) -> None:
    theirs = huggingface.read_config(path)
    for field in fields(theirs):
        if field.name in _NOT_COMPUTED_WITH or field.name.endswith("_token_id"):
            continue
        ours, other = getattr(model.config, field.name), getattr(theirs, field.name)
        if ours != other:
            raise ConfigError(
                f"{path}: {field.name} is {other!r}, and that of the served model is {ours!r}; "
                "give weights of a model with the same configuration"
            )
