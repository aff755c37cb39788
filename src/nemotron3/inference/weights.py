"""Other weights for a model that is being served, put into the memory of the old ones.

They come from a model directory, or by name as in `model.state_dict()`. Everything is compared
before anything is written: all names, shapes and kinds of number, of a directory its configuration
too. So weights that do not fit are an error that leaves the model as it was. Where the model keeps
its own in a number format, plain ones are quantized as they are written.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import state_tensors
from nemotron3.ops.weights import Weight

Weights = str | Path | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""A model directory, or tensors by the names of `model.state_dict()` of the plain model."""
RunningRequests = Literal["recompute", "keep"]
"""What becomes of the states of requests that run while weights are replaced: computed anew by the
new weights, or carried on by them. Their tokens stay either way."""

_RUNNING: tuple[RunningRequests, ...] = ("recompute", "keep")
_NOT_COMPUTED_WITH = {"initializer_range", "max_position_embeddings"}


def prepared_weights(model: LanguageModel, weights: Weights) -> Callable[[], None]:
    """Compare weights with a model; returns what writes them into its tensors."""
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
    """Refuse what is no way to treat running requests."""
    if running not in _RUNNING:
        raise ConfigError(
            f"is {running!r}; it must be one of {', '.join(_RUNNING)}", field="running"
        )


def next_version(current: int, wanted: int | None) -> int:
    """The version of new weights: one more than that of the old ones, where nobody says."""
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
                f"weights {problem} {len(names)} tensors, first {min(names)!r}; give those of "
                "model.state_dict(), all of them"
            )
    for name, target in targets.items():
        given: Any = named[name]
        if not isinstance(given, Tensor) or given.is_meta:
            raise ConfigError(f"weights[{name!r}] is no tensor with values; give its values")
        if given.shape != target.shape:
            raise ConfigError(
                f"weights[{name!r}] has shape {tuple(given.shape)} and the model's has "
                f"{tuple(target.shape)}; they are of another model"
            )
        dtype = target.dtype if isinstance(target, Tensor) else torch.float32
        if given.dtype.is_floating_point != dtype.is_floating_point:
            raise ConfigError(
                f"weights[{name!r}] has dtype {given.dtype} and the model's has {dtype}; "
                "one cannot be written into the other"
            )
        if not isinstance(target, Tensor) and not given.isfinite().all():
            raise ConfigError(
                f"weights[{name!r}] holds values that are not finite; {target.format} cannot "
                "express them"
            )


def _compare_configs(model: LanguageModel, path: Path) -> None:
    theirs = huggingface.read_config(path)
    for field in fields(theirs):
        if field.name in _NOT_COMPUTED_WITH or field.name.endswith("_token_id"):
            continue
        ours, other = getattr(model.config, field.name), getattr(theirs, field.name)
        if ours != other:
            raise ConfigError(
                f"{path}: {field.name} is {other!r}, and that of the model which is served is "
                f"{ours!r}; weights can be replaced by those of the same configuration alone"
            )
