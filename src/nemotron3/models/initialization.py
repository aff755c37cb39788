"""Initial weights, as in the published sources.

These are Megatron-LM's rules with Nemotron's numbers. Every matrix is N(0, std) with
std = sqrt(0.8 / width), which gives the published 0.0173, 0.014 and 0.0099. Matrices that write to
the residual stream are N(0, std / sqrt(layers)), the form for hybrid models of the usual
sqrt(2 layers). Each module declares the initial values of its parameters (initial_values.py). Where
the sources differ or do not say, docs/decisions/0002 gives the choice.

An element depends on the seed, on its parameter's name and on its index. It does not depend on the
order of layers, the other parameters, the device or the dtype: a model in bfloat16 has the rounded
values of the one in float32.
"""

import math
from collections.abc import Container
from itertools import chain

import torch
from torch import Tensor, nn

from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.initial_values import Elements, InitialScale, InitialValue
from nemotron3.models.parameter import parameter_specs

_CHUNK = 1 << 18
"""Elements computed at a time: it bounds the temporary memory, several times that of a chunk."""


@torch.no_grad()
def initialize(
    model: nn.Module, config: ModelConfig, seed: int, *, names: Container[str] | None = None
) -> None:
    """Write the initial value of every parameter and buffer of `model`, or of those in `names`.

    Raises ConfigError for one that its module does not declare.
    """
    scale = InitialScale(config.init_std, config.init_std / math.sqrt(config.num_layers))
    specs = parameter_specs(model)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if names is not None and name not in names:
            continue
        if name not in specs:
            raise ConfigError(
                f"parameter {name!r} has no declared initial value; make it by "
                "DeclaredModule.declare, or load its values"
            )
        _fill(tensor, specs[name].init, scale, seed=seed, name=name)


def _fill(tensor: Tensor, init: InitialValue, scale: InitialScale, *, seed: int, name: str) -> None:
    flat = tensor.view(-1)
    for start in range(0, len(flat), _CHUNK):
        stop = min(start + _CHUNK, len(flat))
        flat[start:stop] = init(Elements(seed, name, start, stop, tensor.device), scale)
