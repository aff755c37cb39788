"""The dtype of a model's activations and products, as data.

Parameters keep their own dtype: float32 masters in training, the checkpoint's dtype in
inference. Activations have the dtype set here, and every product runs in the dtype of its
activations; norms, router, scan and loss always compute in float32.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from nemotron3.models.nemotron_h import LanguageModel


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats of a run."""

    activations: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations, and so of all products. CPUs without native bfloat16 want float32."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.activations]


def apply_precision(model: LanguageModel, config: PrecisionConfig) -> None:
    """Make the model's products run as configured."""
    model.activation_dtype = config.dtype
