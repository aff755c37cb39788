"""Our own dialect, for models that no published layout can express.

Comparison models combine features of several published families, such as a hybrid with SwiGLU
experts or a transformer with multi-token prediction. Their config.json contains the record of
`ModelConfig` under a model type that other programs do not know; tensors are named as in
`nemotron_h`.
"""

from typing import Any

from torch import nn

from nemotron3.config.record import from_record, to_record
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface.fields import Aliases, Fields
from nemotron3.models.huggingface.nemotron_h import (
    our_spelling,
    product_of,
    published_product,
    published_views,
)

__all__ = [
    "ALIASES",
    "MODEL_TYPE",
    "config_from",
    "config_to",
    "our_spelling",
    "product_of",
    "published_product",
    "published_views",
    "unsupported",
]

MODEL_TYPE = "nemotron3"
ALIASES: Aliases = {}


def config_from(fields: Fields, config_class: type[ModelConfig] = ModelConfig) -> ModelConfig:
    """The record of a `ModelConfig`, or of a subclass with further mixers."""
    return from_record(config_class, fields.raw("model", default={}))


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json: the model type, and the record."""
    return {"model_type": MODEL_TYPE, "model": to_record(config)}


def unsupported(model: nn.Module, config: ModelConfig) -> None:
    """Return None: this dialect can express every model."""
