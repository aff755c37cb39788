"""The `qwen3_moe` dialect: the pure transformer that the white paper compares Nano with.

One of its layers, which consists of attention and MoE, is two layers here.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from nemotron3.errors import ConfigError
from nemotron3.models.config import AttentionConfig, ModelConfig, MoEConfig
from nemotron3.models.huggingface.fields import Aliases, Fields
from nemotron3.models.parameter import state_tensors
from nemotron3.ops.weights import Weight

MODEL_TYPE = "qwen3_moe"
ALIASES: Aliases = {
    "num_experts": ("num_local_experts",),
    "rms_norm_eps": ("layer_norm_epsilon", "norm_eps"),
    # Both contain the base of the rotary embedding among other values.
    "rope_theta": ("rope_parameters", "rope_scaling"),
}

_SELECTION_BIAS = "e_score_correction_bias"


def config_from(fields: Fields) -> ModelConfig:
    """The configuration from the fields of a config.json."""
    fields.require("attention_bias", False, "Qwen3 has none")
    fields.require("hidden_act", "silu", "experts are SwiGLU")
    fields.require("decoder_sparse_step", 1, "every layer is a mixture")
    fields.require("use_sliding_window", False, "attention sees everything")
    if fields.raw("mlp_only_layers"):
        raise ConfigError(
            f"{fields.where}: mlp_only_layers is set, but every layer must be a mixture"
        )
    heads = fields.get(int, "num_attention_heads")
    return ModelConfig(
        hybrid_override_pattern="*E" * fields.get(int, "num_hidden_layers"),
        vocab_size=fields.get(int, "vocab_size"),
        hidden_size=fields.get(int, "hidden_size"),
        attention=AttentionConfig(
            num_attention_heads=heads,
            num_key_value_heads=fields.get(int, "num_key_value_heads", default=heads),
            head_dim=fields.get(int, "head_dim", default=fields.get(int, "hidden_size") // heads),
            rope_theta=_rope_theta(fields),
            qk_norm=True,
        ),
        moe=MoEConfig(
            n_routed_experts=fields.get(int, "num_experts"),
            num_experts_per_tok=fields.get(int, "num_experts_per_tok"),
            moe_intermediate_size=fields.get(int, "moe_intermediate_size"),
            norm_topk_prob=fields.get(bool, "norm_topk_prob", default=False),
            activation="swiglu",
            scoring="softmax",
        ),
        layer_norm_epsilon=fields.get(float, "rms_norm_eps", default=1e-6),
        tie_word_embeddings=fields.get(bool, "tie_word_embeddings", default=False),
        initializer_range=fields.get(float, "initializer_range", default=0.02),
        max_position_embeddings=fields.get(int, "max_position_embeddings", default=32_768),
        **fields.special_tokens(bos=0, eos=0, pad=0),
    )


def _rope_theta(fields: Fields) -> float:
    """The base of the rotary embedding, from all fields that contain it."""
    found: dict[str, Any] = {}
    for name, value in fields.spelled("rope_theta").items():
        if name == "rope_theta":
            found[name] = value
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"{fields.where}: {name} is {value!r}, but an object is needed")
        for key in ("rope_type", "type"):
            if value.get(key, "default") != "default":
                raise ConfigError(
                    f"{fields.where}: rotary type {value[key]!r} is not supported ({name})"
                )
        if value.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(
                f"{fields.where}: {name}.partial_rotary_factor is "
                f"{value['partial_rotary_factor']!r}; only 1.0 is supported"
            )
        if value.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = value["rope_theta"]
    return Fields({"rope_theta": fields.agreed(found)}, fields.where, {}).get(float, "rope_theta")


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json."""
    attention, moe = config.attention, config.moe
    assert attention is not None
    assert moe is not None
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": config.num_layers // 2,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": attention.num_attention_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "rope_theta": attention.rope_theta,
        "num_experts": moe.n_routed_experts,
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
        "hidden_act": "silu",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rms_norm_eps": config.layer_norm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }


def unsupported(model: nn.Module, config: ModelConfig) -> str | None:
    """Why this dialect cannot express `model`; None if it can."""
    attention, moe = config.attention, config.moe
    if type(config) is not ModelConfig:
        return "its configuration has fields of its own"
    if str(config.pattern) != "*E" * (config.num_layers // 2):
        return "its layers are not attention and mixture by turns"
    assert attention is not None
    assert moe is not None
    if attention.rope_theta is None or not attention.qk_norm:
        return "its attention lacks rotary positions or QK norm"
    if moe.activation != "swiglu" or moe.scoring != "softmax":
        return "its experts are not SwiGLU under a softmax router"
    if moe.moe_latent_size is not None or moe.moe_shared_expert_intermediate_size:
        return "its mixtures have a latent width or a shared expert"
    if moe.routed_scaling_factor != 1.0:
        return "its mixtures are scaled"
    if any(bias.any() for name, bias in model.named_buffers() if name.endswith(_SELECTION_BIAS)):
        return "its routers have learnt a selection bias"
    return None


def published_views(model: nn.Module, config: ModelConfig) -> Iterator[tuple[str, Weight]]:
    """Every tensor of the checkpoint under its published name, as a view of the model's own."""
    assert config.moe is not None
    hidden = config.moe.moe_intermediate_size
    for name, tensor in state_tensors(model):
        if name.endswith(_SELECTION_BIAS):
            continue
        if not name.startswith("backbone.layers."):
            yield _OUTSIDE[name], tensor
            continue
        index, _, rest = name.removeprefix("backbone.layers.").partition(".")
        layer, is_mixture = divmod(int(index), 2)
        stem = f"model.layers.{layer}."
        if rest == "norm.weight":
            yield (
                stem
                + ("post_attention_layernorm" if is_mixture else "input_layernorm")
                + ".weight",
                tensor,
            )
        elif not is_mixture:
            yield stem + rest.replace("mixer.", "self_attn."), tensor
        elif rest == "mixer.gate.weight":
            yield stem + "mlp.gate.weight", tensor
        else:
            for expert, matrix in enumerate(tensor):
                prefix = f"{stem}mlp.experts.{expert}."
                if rest.endswith("up_proj"):
                    yield prefix + "gate_proj.weight", matrix[:hidden]
                    yield prefix + "up_proj.weight", matrix[hidden:]
                else:
                    yield prefix + "down_proj.weight", matrix


def published_product(name: str) -> str:
    """The published name of the module, or of the stacked parameter, of a product."""
    if not name.startswith("backbone.layers."):
        return name
    index, _, rest = name.removeprefix("backbone.layers.").partition(".")
    layer, is_mixture = divmod(int(index), 2)
    rest = rest.replace("mixer.", "mlp." if is_mixture else "self_attn.")
    return f"model.layers.{layer}.{rest.replace('experts.up_proj', 'experts.gate_up_proj')}"


def product_of(name: str) -> str:
    """The published product, as `published_product` names it, to which a stored weight belongs."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name
    return f"{match[1]}.{'down_proj' if match[2] == 'down_proj' else 'gate_up_proj'}"


_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(gate_proj|up_proj|down_proj)\.weight")
_OUTSIDE = {
    "backbone.embeddings.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def our_spelling(name: str) -> str:
    """A stored tensor's name as this package writes it."""
    return name.removeprefix("language_model.")
