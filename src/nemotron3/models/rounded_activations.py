"""Models whose products round their activations (ops/weights/integer.py), to be run faster.

What is rounded are the inputs of products with matrices of int8 and NVFP4, each row by itself and
the same in a prompt as in a decoding step. All else stays float32: router, norms, convolution, scan
and attention, and products with FP8 and plain matrices, which are no products of integers.
"""

import torch
from torch import nn

from nemotron3.errors import ConfigError
from nemotron3.models.lora import shared_model
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import name_of_formats, weight_format
from nemotron3.ops.weights import ActivationFormat, ExpertMatrices, IntegerWeight

_FORMATS: tuple[ActivationFormat, ...] = ("int8",)


def check_rounded_activations(
    activations: str, *, device: torch.device, dtype: torch.dtype | None, format: str | None
) -> None:
    """Raise ConfigError where no product of a model with such weights would be faster.

    `format` is the number format of the weights, "mixed" for several and None for plain ones.
    """
    if activations not in _FORMATS:
        raise ConfigError(
            f"is {activations!r}; products round their activations to {', '.join(_FORMATS)}, "
            "or not at all",
            field="activations",
        )
    if device.type != "cpu":
        raise ConfigError(
            f"is {activations!r}, and the model is on {device}; products of integers are for "
            "processors: leave it out, or set device to 'cpu'",
            field="activations",
        )
    if dtype not in (None, torch.float32):
        raise ConfigError(
            f"is {activations!r}, and the model computes in {dtype}; what is rounded are float32 "
            "activations: leave it out, or set dtype to float32",
            field="activations",
        )
    if format in (None, "fp8"):
        held = "plain" if format is None else f"in {format}"
        raise ConfigError(
            f"is {activations!r}, and the model's matrices are {held}; only those in int8 and "
            "nvfp4 are integers: set {other} to one of them, or leave it out",
            field="activations",
            other="weights",
        )


def can_round_activations(model: LanguageModel) -> bool:
    """Whether `round_activations` takes the model."""
    has_integers = any(_has_integers(module) for module in model.modules())
    return has_integers and model.device.type == "cpu" and model.compute_dtype == torch.float32


def _has_integers(weight: nn.Module) -> bool:
    kind = weight.kind if isinstance(weight, ExpertMatrices) else type(weight)
    return issubclass(kind, IntegerWeight)


def round_activations(model: LanguageModel, activations: ActivationFormat | None) -> LanguageModel:
    """A model with all tensors of `model`, whose products round activations; None for `model`.

    Raises ConfigError where that would change nothing, or make nothing faster.
    """
    if activations is None:
        return model
    formats = [str(module.format) for module in model.modules() if _has_integers(module)]
    found = name_of_formats(formats) or weight_format(model)
    device, dtype = model.device, model.compute_dtype
    check_rounded_activations(activations, device=device, dtype=dtype, format=found)
    rounded = shared_model(model)
    for module in rounded.modules():
        for name, weight in list(module.named_children()):
            if isinstance(weight, IntegerWeight | ExpertMatrices):
                setattr(module, name, weight.with_activations(activations))
    return rounded
