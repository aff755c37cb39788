"""The named model sizes, as plain data.

`nano`, `super` and `ultra` are the published models (reports' tables 1; layer patterns as in
NVIDIA's Megatron-LM configurations). `qwen3-moe` is Qwen3-30B-A3B, the pure transformer that the
white paper compares Nano with. `small` is for one GPU and `tiny` for two CPU cores; both have every
part that Super has: Mamba-2, attention, LatentMoE with a shared expert, and two depths of
multi-token prediction.
"""

from typing import Any

_MTP = "/*E/*E"

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hybrid_override_pattern": "MEM*EME" + _MTP,
        "vocab_size": 1024,
        "hidden_size": 128,
        "mamba": {
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "ssm_state_size": 32,
            "n_groups": 2,
            "chunk_size": 64,
        },
        "attention": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        "moe": {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 128,
            "moe_shared_expert_intermediate_size": 256,
            "moe_latent_size": 64,
            "routed_scaling_factor": 2.5,
        },
        "max_position_embeddings": 8192,
    },
    "small": {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEME" + _MTP,
        "vocab_size": 32_768,
        "hidden_size": 512,
        "mamba": {
            "mamba_num_heads": 16,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
        },
        "attention": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
        "moe": {
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 336,
            "moe_shared_expert_intermediate_size": 672,
            "moe_latent_size": 128,
            "routed_scaling_factor": 5.0,
        },
    },
    "nano": {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "vocab_size": 131_072,
        "hidden_size": 2688,
        "mamba": {
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
        },
        "attention": {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128},
        "moe": {
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "routed_scaling_factor": 2.5,
        },
    },
    "super": {
        "hybrid_override_pattern": (
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
            "EMEMEMEM*EMEMEMEME"
        )
        + _MTP,
        "vocab_size": 131_072,
        "hidden_size": 4096,
        "mamba": {
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
        },
        "attention": {"num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128},
        "moe": {
            "n_routed_experts": 512,
            "num_experts_per_tok": 22,
            "moe_intermediate_size": 2688,
            "moe_shared_expert_intermediate_size": 5376,
            "moe_latent_size": 1024,
            "routed_scaling_factor": 5.0,
        },
    },
    "ultra": {
        "hybrid_override_pattern": (
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
            "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        )
        + _MTP,
        "vocab_size": 131_072,
        "hidden_size": 8192,
        "mamba": {
            "mamba_num_heads": 256,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
        },
        "attention": {"num_attention_heads": 64, "num_key_value_heads": 2, "head_dim": 128},
        "moe": {
            "n_routed_experts": 512,
            "num_experts_per_tok": 22,
            "moe_intermediate_size": 5120,
            "moe_shared_expert_intermediate_size": 10_240,
            "moe_latent_size": 2048,
            "routed_scaling_factor": 5.0,
        },
    },
    "qwen3-moe": {
        "hybrid_override_pattern": "*E" * 48,
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "attention": {
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "rope_theta": 1_000_000.0,
            "qk_norm": True,
        },
        "moe": {
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "activation": "swiglu",
            "scoring": "softmax",
        },
        "layer_norm_epsilon": 1e-6,
        "initializer_range": 0.02,
        "max_position_embeddings": 40_960,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "pad_token_id": 151_643,
    },
}
"""Fields of `ModelConfig` by preset name, its parts as nested tables."""
