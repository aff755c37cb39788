"""Small models of every kind, at sizes that hide nothing.

No two widths are equal, so that a transposed or swapped one shows: the queries are wider than the
model, Mamba's inner width is neither, groups are two, the latent width is its own. `randomized`
then moves every parameter off the value at which it would do nothing (norm weights of one, biases
of zero), so that a parameter that is dropped or misplaced changes the result.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from nemotron3.models.config import AttentionConfig, MambaConfig, MLPConfig, ModelConfig, MoEConfig
from nemotron3.models.nemotron_h import LanguageModel

MAMBA = MambaConfig(
    mamba_num_heads=6, mamba_head_dim=8, ssm_state_size=10, n_groups=2, chunk_size=8
)
ATTENTION = AttentionConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=20)
MOE = MoEConfig(
    n_routed_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    moe_shared_expert_intermediate_size=40,
    moe_latent_size=32,
    routed_scaling_factor=2.5,
)
MLP = MLPConfig(intermediate_size=56)
WHOLE_BLOCKS = {
    "moe": {"moe_intermediate_size": 112, "moe_shared_expert_intermediate_size": 144},
    "mlp": {"intermediate_size": 160},
}
"""Changes with which every matrix has blocks of 16 inputs, as NVFP4 needs them."""
_PARTS: dict[str, tuple[str, Any]] = {
    "M": ("mamba", MAMBA),
    "*": ("attention", ATTENTION),
    "E": ("moe", MOE),
    "-": ("mlp", MLP),
}


def tiny_config(pattern: str = "MEM*E/*E/*E", **changes: Any) -> ModelConfig:
    """A configuration with just the parts that `pattern` needs.

    `changes` are fields of ModelConfig; a part may be given as a dict of the fields to change.
    """
    parts = {}
    for symbol in sorted(_PARTS):
        name, part = _PARTS[symbol]
        if symbol not in pattern:
            changes.pop(name, None)
            continue
        parts[name] = dataclasses.replace(part, **changes.pop(name, {}))
    return ModelConfig(
        hybrid_override_pattern=pattern,
        **({"vocab_size": 97, "hidden_size": 64, "max_position_embeddings": 512} | changes),
        **parts,
    )


def qwen_config(layers: int = 2, **changes: Any) -> ModelConfig:
    """The comparison transformer: rotary positions, QK norm, SwiGLU experts, softmax router."""
    return tiny_config(
        "*E" * layers,
        attention={"rope_theta": 10_000.0, "qk_norm": True},
        moe={
            "activation": "swiglu",
            "scoring": "softmax",
            "moe_latent_size": None,
            "moe_shared_expert_intermediate_size": 0,
            "routed_scaling_factor": 1.0,
        }
        | changes.pop("moe", {}),
        layer_norm_epsilon=1e-6,
        **changes,
    )


@torch.no_grad()
def randomized(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Draw every parameter so that each of them matters and activations keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(t: Tensor, std: float) -> Tensor:
        return torch.randn(t.shape, generator=generator) * std

    def uniform(t: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(t.shape, generator=generator) * (high - low) + low

    for name, tensor in model.state_dict().items():
        last = name.rpartition(".")[2]
        if last == "A_log":
            value = uniform(tensor, 1.0, 16.0).log()
        elif last == "dt_bias":
            # Steps from below to far above the range of the initialisation.
            value = torch.expm1(uniform(tensor, math.log(2e-4), math.log(0.3)).exp()).log()
        elif last == "D" or "norm" in name:
            value = 1 + normal(tensor, 0.2)
        elif last == "e_score_correction_bias":
            value = normal(tensor, 0.1)
        elif last == "bias":
            value = normal(tensor, 0.2)
        elif "embeddings" in name:
            value = normal(tensor, 1.0)
        else:
            value = normal(tensor, tensor.shape[-1] ** -0.5)
        tensor.copy_(value)
    return model


def tiny_model(
    pattern: str | ModelConfig = "MEM*E/*E/*E", seed: int = 0, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A randomized tiny model."""
    config = pattern if isinstance(pattern, ModelConfig) else tiny_config(pattern)
    return randomized(LanguageModel.from_config(config, dtype=dtype), seed)


def tokens_for(config: ModelConfig, *shape: int, seed: int = 1) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
