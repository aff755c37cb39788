"""The dtype of a model's activations and products, as data.

Parameters keep their own dtype: float32 masters in training, the checkpoint's dtype in
inference. Activations have the dtype set here, and every product runs in the dtype of its
activations; norms, router, scan and loss always compute in float32. Beside an adapter, matrices of
products and embedding are frozen, and have the dtype of activations (recipes/adapters.py).

The matrices of dense layers, experts and output layer may have a narrower number format
(ops/weights). The products of such a model are the same, but these matrices have no gradients: the
model is for inference, or for training other parameters.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemotron3.models.allocation import allocate
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import state_tensors, use_weight_format
from nemotron3.ops.weights import WeightFormat, dequantized


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats of a run."""

    activations: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of all products; float32 is faster on CPUs without bfloat16."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.activations]


def apply_precision(model: LanguageModel, config: PrecisionConfig) -> None:
    """Set the dtype of the model's activations."""
    model.activation_dtype = config.dtype


def convert_weights(model: LanguageModel, weights: WeightFormat | None) -> LanguageModel:
    """A copy of the model with its matrices in another number format.

    None dequantizes them to the dtype of the embedding, which is never quantized.
    """
    with torch.device("meta"):
        converted = type(model)(model.config)
        if weights is not None:
            use_weight_format(converted, weights)
    allocate(converted, model.device, model.backbone.embeddings.weight.dtype)
    values = dict(state_tensors(model))
    with torch.no_grad():
        for name, target in state_tensors(converted):
            if isinstance(target, Tensor):
                target.copy_(dequantized(values[name]))
            else:
                target.copy_(values[name])
    converted.activation_dtype, converted.companions = model.activation_dtype, model.companions
    return converted
