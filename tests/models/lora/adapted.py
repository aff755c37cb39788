"""Models with adapters that change something."""

import torch

from nemotron3.models.lora import LoRAConfig, add_lora
from nemotron3.models.nemotron_h import LanguageModel
from tests.tiny import tiny_config, tiny_model

PATTERN = "MEM*E-/*E/*E"
SMALL = LoRAConfig(rank=3, alpha=7.0)
EVERYTHING = LoRAConfig(rank=3, alpha=7.0, targets=("all-linear", "out_proj", "lm_head"))


@torch.no_grad()
def with_change(model: LanguageModel, *, seed: int = 0, size: float = 0.1) -> LanguageModel:
    """An adapter whose B is not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def adapted_model(
    pattern: str = PATTERN, lora: LoRAConfig = EVERYTHING, *, seed: int = 0
) -> LanguageModel:
    """A tiny model with an adapter that changes what it computes."""
    model = tiny_model(tiny_config(pattern))
    add_lora(model, lora, seed=seed)
    return with_change(model, seed=seed)
