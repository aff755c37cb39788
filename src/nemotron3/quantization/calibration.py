"""The largest activations that each quantized product sees on some text, and keys and values.

Published checkpoints hold a scale of the activations of each product (`input_scale`): static for
FP8, and the tensor scale of NVFP4. It is the largest magnitude on calibration text divided by the
largest number of the format. This package multiplies unrounded activations and reads no such scale;
engines that round them need it.

They also hold a scale of the keys and one of the values of each attention layer (`k_scale` and
`v_scale`), with which an engine keeps them in FP8: the largest magnitude as it is stored, after the
norm and the rotation of keys where a model has these.

An expert that no token of the text chooses gets the largest magnitude of its layer, as ModelOpt
does.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemotron3.data import Batch
from nemotron3.models.attention import Attention
from nemotron3.models.experts import RoutedExperts, Routing
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.linear import Linear
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.experts.api import activate
from nemotron3.ops.segments import Segments
from nemotron3.ops.weights import WeightFormat

_LARGEST = {"fp8": 448.0, "nvfp4": 6.0 * 448.0}
"""What the largest activation is mapped to, in the formats that have such a scale."""


class Calibration(NamedTuple):
    """Scales that depend on text."""

    activations: dict[str, Tensor]
    """By the names of parameters: [] for a matrix, [experts] for experts."""
    keys: dict[str, tuple[Tensor, Tensor]]
    """Of keys and of values, [] each, by the names of attention layers."""


@torch.no_grad()
def calibrate(
    model: LanguageModel, batches: Iterable[Batch], formats: Mapping[str, WeightFormat]
) -> Calibration:
    """The scales with which the largest numbers of a text are the largest of a format.

    `model` is the plain model, which reads the batches. Formats without such a scale have none.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for prefix, module in model.named_modules():
            hook = _hook(module, prefix, found, formats)
            if hook is not None:
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        for batch in batches:
            moved = batch.to(model.device)
            layout = SequenceLayout(Segments(moved.lengths))
            model.hidden_states(moved.tokens, layout=layout)
    scales: dict[str, Tensor] = {}
    keys: dict[str, tuple[Tensor, Tensor]] = {}
    for name, largest in found.items():
        if name not in formats:
            of_keys, of_values = largest / _LARGEST["fp8"]
            keys[name] = of_keys, of_values
            continue
        seen = torch.where(largest > 0, largest, largest.amax())
        scales[name] = seen / _LARGEST[formats[name]]
    return Calibration(scales, keys)


def _hook(
    module: nn.Module, prefix: str, found: dict[str, Tensor], formats: Mapping[str, WeightFormat]
) -> Callable[[nn.Module, Any], None] | None:
    """What records the operands of a module; None where it has no scale."""

    def record(name: str, largest: Tensor) -> None:
        kept = found.get(name)
        found[name] = largest if kept is None else torch.maximum(kept, largest)

    if isinstance(module, Attention):

        def attention(own: nn.Module, operands: tuple[Tensor, SequenceLayout]) -> None:
            assert isinstance(own, Attention)
            pair = own.keys_and_values(operands[0], operands[1])
            record(prefix, torch.stack([_largest(each) for each in pair]))

        return attention

    if isinstance(module, Linear) and formats.get(f"{prefix}.weight") in _LARGEST:

        def linear(_: nn.Module, operands: tuple[Tensor, ...]) -> None:
            record(f"{prefix}.weight", _largest(operands[0]))

        return linear
    if isinstance(module, RoutedExperts) and formats.get(f"{prefix}.up_proj") in _LARGEST:

        def experts(own: nn.Module, operands: tuple[Tensor, Routing]) -> None:
            assert isinstance(own, RoutedExperts)
            inputs, hidden = _of_experts(own, *operands)
            record(f"{prefix}.up_proj", inputs)
            record(f"{prefix}.down_proj", hidden)

        return experts
    return None


def _of_experts(module: RoutedExperts, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The largest input and hidden unit of each expert, 0 where no token chose it."""
    up = module.up_proj
    assert isinstance(up, Tensor)
    inputs, hidden = x.new_zeros(len(up)).float(), x.new_zeros(len(up)).float()
    for expert, matrix in enumerate(up):
        rows = x[(routing.indices == expert).any(-1)]
        if len(rows):
            inputs[expert] = _largest(rows)
            units = activate(F.linear(rows, matrix.to(rows.dtype)), module.config.activation)
            hidden[expert] = _largest(units)
    return inputs, hidden


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
