"""Adapters in runs: the model that they are trained in, and the directories that they become."""

from pathlib import Path
from typing import NamedTuple

import torch

from nemotron3.errors import ConfigError
from nemotron3.models import huggingface
from nemotron3.models.lora import (
    LoRAConfig,
    add_lora,
    dequantized_with,
    merge_adapter,
    read_adapter,
    shared_model,
)
from nemotron3.models.lora.peft import companions_with_adapter
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import weight_format
from nemotron3.models.precision import PrecisionConfig, apply_precision
from nemotron3.training.trainer import TrainingConfig

LEARNING_RATE_FACTOR = 10.0
"""Of an adapter's learning rate over that of all parameters: what Schulman et al., *LoRA Without
Regret* (2025), found over models and data."""


def model_to_train(
    path: str,
    lora: LoRAConfig | None,
    *,
    precision: PrecisionConfig,
    device: torch.device,
    seed: int,
) -> LanguageModel:
    """A model with float32 weights, and with an adapter if there is to be one.

    Beside an adapter, the matrices of products and the embedding are in the dtype of activations:
    they are frozen, and nothing reads them in a wider one. Weights that are stored quantized stay
    as they are; `check_stored_weights` says when they cannot.
    """
    model = _read(path, lora, precision=precision, device=device)
    if lora is not None:
        add_lora(model, lora, seed=seed)
    return model


def model_to_play(
    path: str, lora: LoRAConfig | None, *, precision: PrecisionConfig, device: torch.device
) -> LanguageModel:
    """A model of an engine's own, which takes up the weights of a `model_to_train`.

    It has the tensors of the model that plays beside the trainer: merged ones in their place, and
    those of changes beside quantized weights.
    """
    model = _read(path, lora, precision=precision, device=device)
    if lora is not None and weight_format(model) is not None:
        add_lora(model, lora, seed=0)
        model = shared_model(model)
    return model


def _read(
    path: str, lora: LoRAConfig | None, *, precision: PrecisionConfig, device: torch.device
) -> LanguageModel:
    frozen = None if lora is None else precision.dtype
    model = LanguageModel.from_pretrained(
        path, device=device, dtype=torch.float32, cast_dtype=frozen
    )
    apply_precision(model, precision)
    return model


def bias_update_rate(lora: LoRAConfig | None) -> float:
    """That of a run by default: an adapter leaves the biases of the frozen model alone."""
    return TrainingConfig.bias_update_rate if lora is None else 0.0


def check_adapter_training(lora: LoRAConfig | None, training: TrainingConfig) -> None:
    """Raise ConfigError for training that changes what no adapter holds."""
    if lora is not None and training.bias_update_rate:
        raise ConfigError(
            f"is {training.bias_update_rate} and {{other}} is set: selection biases belong to the "
            "frozen model, and an adapter has none; set it to 0",
            field="training.bias_update_rate",
            other="lora",
        )


def check_stored_weights(
    path: str | Path, lora: LoRAConfig | None, precision: PrecisionConfig
) -> None:
    """Raise ConfigError for training that the stored format of a model's weights does not allow."""
    held = huggingface.stored_weight_format(path)
    if held is None:
        return
    if lora is None:
        raise ConfigError(
            f"{path} holds {held} weights, which have no gradients. Train an adapter beside them "
            "with --lora.rank 16; or take the plain model; or dequantize them in Python: "
            "convert_weights(LanguageModel.from_pretrained(PATH), None).save_pretrained(OUT), with "
            "convert_weights of nemotron3.models.precision"
        )
    if precision.recipe != "plain":
        raise ConfigError(
            f"is {precision.recipe!r}, which rounds the operands of products, and {path} holds "
            f"{held} weights, whose products it cannot round; set it to 'plain'",
            field="training.precision.recipe",
        )


class MergedAdapter(NamedTuple):
    """What a merge of an adapter did."""

    num_products: int
    """That the adapter changed."""
    dequantized: str | None
    """The number format that weights were dequantized from; None if they were plain."""
    dtype: torch.dtype
    """Of the merged matrices."""


def merge_adapter_directory(model: Path, adapter: Path, out: Path) -> MergedAdapter:
    """Write a model directory with an adapter merged.

    Weights keep their stored dtype; quantized ones become plain, in the dtype of the embedding,
    since a merged matrix does not fit the codes. Template, generation defaults and all other files
    are those of the model, or of the adapter where it has its own.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; name a new directory for the merged model")
    merged = LanguageModel.from_pretrained(model)
    changes, held = read_adapter(adapter, merged), weight_format(merged)
    if held is None:
        merge_adapter(merged, changes)
    else:
        merged = dequantized_with(merged, changes)
    assert merged.companions is not None
    merged.companions = companions_with_adapter(merged.companions, adapter)
    merged.save_pretrained(out)
    return MergedAdapter(len(changes), held, merged.compute_dtype)
