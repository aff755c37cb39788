"""A model in training whose matrices are rounded in each forward pass, as its result will be.

The student of a distillation computes with the values that its matrices have in their number
formats, and its gradients go to the unrounded matrices, as if rounding did nothing (the
straight-through estimator, Bengio et al., arXiv 1308.3432). Small updates add up there, until an
element rounds to its next number. Scales are chosen again at each pass by the rule that the result
is quantized by, so what is trained is the very function of the result.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nemotron3.models.initial_values import Constant
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.nvfp4 import Scales
from nemotron3.ops.weights import ComputedWeight, WeightFormat, quantize_weight

_MASTER = "master"


class RoundedWeight(DeclaredModule, ComputedWeight):
    """A float32 matrix, or one for each expert, that is rounded to a number format where it is
    used."""

    master: nn.Parameter

    def __init__(self, values: Tensor, kind: WeightFormat, scales: Scales) -> None:
        super().__init__()
        self.format, self.scales = kind, scales
        with values.device:
            self.declare(_MASTER, values.shape, init=Constant(0.0), decays=True, keep_float32=True)
        with torch.no_grad():
            self.master.copy_(values)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix, or matrices."""
        return self.master.shape

    def value(self, dtype: torch.dtype | None = None) -> Tensor:
        """The rounded values, with the gradients of unrounded ones."""
        rounded: Tensor = _Rounding.apply(self.master, self.format, self.scales, dtype)
        return rounded

    def extra_repr(self) -> str:
        """Its shape and format."""
        return f"{' x '.join(map(str, self.shape))}, {self.format}"


def student_of(
    model: LanguageModel, formats: Mapping[str, WeightFormat], *, scales: Scales
) -> LanguageModel:
    """A float32 copy of the model, with rounded weights in place of the parameters in `formats`."""
    with torch.device("meta"):
        student = type(model)(model.config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        prefix, _, last = name.rpartition(".")
        module = student.get_submodule(prefix)
        if name in formats:
            delattr(module, last)
            setattr(module, last, RoundedWeight(tensor.detach(), formats[name], scales))
        elif isinstance(tensor, nn.Parameter):
            setattr(module, last, nn.Parameter(tensor.detach().float().clone()))
        else:
            module.register_buffer(last, tensor.clone())
    student.companions = model.companions
    return student


def unrounded_model(student: LanguageModel, like: LanguageModel) -> LanguageModel:
    """What was trained, as a plain model: matrices before rounding, in the student's memory.

    All other parameters have the dtypes of `like`.
    """
    with torch.device("meta"):
        plain = type(student)(student.config)
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        own = name.removesuffix(f".{_MASTER}")
        prefix, _, last = own.rpartition(".")
        module = plain.get_submodule(prefix)
        if own != name:
            setattr(module, last, nn.Parameter(tensor.detach(), requires_grad=False))
        elif isinstance(tensor, nn.Parameter):
            values = tensor.detach().to(like.get_parameter(name).dtype)
            setattr(module, last, nn.Parameter(values, requires_grad=False))
        else:
            module.register_buffer(last, tensor)
    plain.activation_dtype, plain.companions = like.activation_dtype, like.companions
    return plain


class _Rounding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, master: Tensor, kind: str, scales: Scales, dtype: torch.dtype | None
    ) -> Tensor:
        del ctx
        return quantize_weight(kind, master, scales=scales).dequantize(dtype or torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        del ctx
        return gradient.float(), None, None, None
