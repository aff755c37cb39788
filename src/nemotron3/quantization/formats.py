"""Which matrices of a model have which number format.

`nvfp4` and `fp8` are for every matrix of a product in the backbone. The output layer and the
multi-token-prediction block stay as they are, as in all published checkpoints: they are a small
part, and an error there goes straight into the answer. `int8` is for these too. `mixed` is the
published mix of Ultra: routed experts in NVFP4, shared experts and both projections of Mamba in
FP8, attention and latent projections as they are.

Which part of a model a matrix belongs to is seen by the module that holds it, not by its name.
"""

from typing import Literal

from torch import nn

from nemotron3.errors import ConfigError
from nemotron3.models.experts import MixtureOfExperts
from nemotron3.models.mamba2 import Mamba2Mixer
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import quantizable_names
from nemotron3.ops.weights import FORMATS, WeightFormat

Format = Literal["nvfp4", "fp8", "int8", "mixed"]


def formats_for(model: LanguageModel, wanted: Format) -> dict[str, WeightFormat]:
    """Formats by the names of parameters; matrices without one stay as they are.

    Raises ConfigError where there are no such matrices, or one cannot have its format.
    """
    match wanted:
        case "int8":
            formats: dict[str, WeightFormat] = dict.fromkeys(quantizable_names(model), "int8")
        case "nvfp4" | "fp8":
            formats = dict.fromkeys(_in_backbone(model), wanted)
        case "mixed":
            formats = _published_mix(model)
    if not formats:
        raise ConfigError(
            f"is {wanted!r}, and the model has no matrix that it is for", field="format"
        )
    for name, kind in formats.items():
        inputs, block = model.get_parameter(name).shape[-1], FORMATS[kind].block
        if inputs % block:
            raise ConfigError(
                f"is {wanted!r}, and {name!r} has {inputs} inputs, which are not divisible by the "
                f"{block} of a block of {kind}; fp8 and int8 have no blocks",
                field="format",
            )
    return formats


def _in_backbone(model: LanguageModel) -> list[str]:
    return [name for name in quantizable_names(model) if name.startswith("backbone.")]


def _published_mix(model: LanguageModel) -> dict[str, WeightFormat]:
    formats: dict[str, WeightFormat] = {}
    for prefix, module in model.backbone.named_modules(prefix="backbone"):
        if isinstance(module, MixtureOfExperts):
            formats |= dict.fromkeys(_below(f"{prefix}.experts", module.experts), "nvfp4")
            if module.shared_experts is not None:
                shared = _below(f"{prefix}.shared_experts", module.shared_experts)
                formats |= dict.fromkeys(shared, "fp8")
        elif isinstance(module, Mamba2Mixer):
            formats |= dict.fromkeys(_below(prefix, module), "fp8")
    return formats


def _below(prefix: str, module: nn.Module) -> list[str]:
    return [f"{prefix}.{name}" for name in quantizable_names(module)]
