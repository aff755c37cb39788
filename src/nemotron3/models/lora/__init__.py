"""LoRA: low-rank changes of a model's products, trained, merged, saved and read."""

from nemotron3.models.lora.adapter import (
    Adapter,
    adapter_of,
    add_lora,
    changed_parameters,
    dequantized_with,
    has_quantized_base,
    is_adapted,
    load_adapter,
    merge_adapter,
    merge_into,
    merge_own_adapter,
    shared_model,
    trained_tensors,
    with_own_changes,
)
from nemotron3.models.lora.config import LoRAConfig
from nemotron3.models.lora.peft import read_adapter, write_adapter

__all__ = [
    "Adapter",
    "LoRAConfig",
    "adapter_of",
    "add_lora",
    "changed_parameters",
    "dequantized_with",
    "has_quantized_base",
    "is_adapted",
    "load_adapter",
    "merge_adapter",
    "merge_into",
    "merge_own_adapter",
    "read_adapter",
    "shared_model",
    "trained_tensors",
    "with_own_changes",
    "write_adapter",
]
