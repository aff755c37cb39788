"""The `nemotron_h` dialect: config.json and tensor names of Nemotron 3 and its relatives.

Published files have three forms of the layer list: Megatron's pattern string (Nano, Super), lists
of `mamba / moe / attention / mlp` (Ultra), and lists of `linear_attention / moe / full_attention /
mlp` (saved by transformers 5). Saving writes the first two, which all engines read.

`num_nextn_predict_layers` counts the blocks in the file, not the depths that share a block. The
reports train two depths with the one block of Super and Ultra, so a file with their layers has two
depths; `num_mtp_depths`, a field of our own, sets another number.
"""

import logging
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from nemotron3.errors import ConfigError
from nemotron3.models.config import (
    AttentionConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from nemotron3.models.huggingface.fields import Aliases, Fields, number
from nemotron3.models.parameter import state_tensors
from nemotron3.models.pattern import LayerPattern, parse_pattern
from nemotron3.ops.weights import Weight

MODEL_TYPE = "nemotron_h"
ALIASES: Aliases = {
    "hybrid_override_pattern": ("layers_block_type", "layer_types"),
    "mtp_hybrid_override_pattern": ("mtp_layers_block_type",),
    "layer_norm_epsilon": ("norm_eps", "rms_norm_eps"),
    "n_groups": ("mamba_n_groups", "mamba_ngroups"),
    "conv_kernel": ("mamba_d_conv",),
    "chunk_size": ("mamba_chunk_size",),
    "time_step_min": ("mamba_dt_min",),
    "time_step_max": ("mamba_dt_max",),
    "time_step_floor": ("mamba_dt_init_floor",),
    "time_step_limit": ("mamba_dt_limit",),
    "use_conv_bias": ("mamba_conv_bias",),
    "head_dim": ("attention_head_dim",),
    "n_routed_experts": ("num_local_experts",),
}

_EXPERT = re.compile(r"(.*\.experts)\.\d+\.(up_proj|down_proj)\.weight")

logger = logging.getLogger(__name__)

_KINDS = {
    mixer.symbol: mixer.label for mixer in (MambaConfig, AttentionConfig, MoEConfig, MLPConfig)
}
"""The kinds of layers of this layout, by their characters."""
_BLOCK_TYPES = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
_WRITTEN_BLOCK_TYPES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


def config_from(fields: Fields) -> ModelConfig:
    """The configuration from the fields of a config.json."""
    _refuse_other_arithmetic(fields)
    pattern = _pattern(fields)
    kinds = pattern.symbols
    layers = fields.raw("num_hidden_layers")
    if layers is not None and layers != len(pattern.main):
        main = str(pattern).partition("/")[0]
        raise ConfigError(
            f"{fields.where}: num_hidden_layers is {layers}, but the layer list {main!r} has "
            f"{len(pattern.main)}"
        )
    return ModelConfig(
        hybrid_override_pattern=str(pattern),
        vocab_size=fields.get(int, "vocab_size"),
        hidden_size=fields.get(int, "hidden_size"),
        mamba=_mamba(fields) if MambaConfig.symbol in kinds else None,
        attention=_attention(fields) if AttentionConfig.symbol in kinds else None,
        moe=_moe(fields) if MoEConfig.symbol in kinds else None,
        mlp=MLPConfig(intermediate_size=fields.get(int, "intermediate_size"))
        if MLPConfig.symbol in kinds
        else None,
        layer_norm_epsilon=fields.get(float, "layer_norm_epsilon", default=1e-5),
        tie_word_embeddings=False,
        initializer_range=fields.get(float, "initializer_range", default=0.02),
        max_position_embeddings=fields.get(int, "max_position_embeddings", default=262_144),
        **fields.special_tokens(bos=1, eos=2, pad=0),
    )


def config_to(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json, under the names that most programs read."""
    main, mtp = "".join(config.pattern.main), "".join(config.pattern.mtp)
    fields: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["NemotronHForCausalLM"],
        "hybrid_override_pattern": main,
        "layers_block_type": [_WRITTEN_BLOCK_TYPES[c] for c in main],
        "num_hidden_layers": len(main),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "tie_word_embeddings": False,
        "initializer_range": config.init_std,
        "max_position_embeddings": config.max_position_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "residual_in_fp32": False,
        "rescale_prenorm_residual": True,
        "num_logits_to_keep": 1,
        "num_nextn_predict_layers": 1 if mtp else 0,
        "attention_bias": False,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        # JSON has no infinity; programs read this number as one.
        "time_step_limit": [0.0, 1e30],
        "n_group": 1,
        "topk_group": 1,
    }
    if mtp:
        fields |= {
            "mtp_hybrid_override_pattern": mtp,
            "mtp_layers_block_type": [_WRITTEN_BLOCK_TYPES[c] for c in mtp],
            # The number of depths that share the physical block; published files do not have it.
            "num_mtp_depths": config.pattern.num_mtp_depths,
        }
    if config.mamba is not None:
        m = config.mamba
        names = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel")
        names += ("chunk_size", "time_step_min", "time_step_max", "time_step_floor")
        fields |= {name: getattr(m, name) for name in names}
    if config.attention is not None:
        a = config.attention
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        fields |= {name: getattr(a, name) for name in names}
    if config.moe is not None:
        e = config.moe
        names = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
        names += ("moe_shared_expert_intermediate_size", "moe_latent_size")
        names += ("routed_scaling_factor", "norm_topk_prob")
        fields |= {name: getattr(e, name) for name in names}
        fields["n_shared_experts"] = 1 if e.moe_shared_expert_intermediate_size else 0
        fields["intermediate_size"] = e.moe_intermediate_size
    if config.mlp is not None:
        fields["intermediate_size"] = config.mlp.intermediate_size
    return fields


def unsupported(model: nn.Module, config: ModelConfig) -> str | None:  # noqa: ARG001
    """Why this dialect cannot express `model`; None if it can."""
    moe, attention, mlp = config.moe, config.attention, config.mlp
    if type(config) is not ModelConfig:
        return "its configuration has fields of its own"
    if config.tie_word_embeddings:
        return "its output layer is the embedding matrix"
    if moe is not None and (moe.activation != "relu2" or moe.scoring != "sigmoid"):
        return "its experts are not squared ReLU under a sigmoid router"
    if moe is not None and not moe.moe_shared_expert_intermediate_size:
        return "its mixtures have no shared expert"
    if attention is not None and (attention.rope_theta is not None or attention.qk_norm):
        return "its attention has rotary positions or QK norm"
    if mlp is not None and mlp.activation != "relu2":
        return "its dense layers are not squared ReLU"
    return None


def published_views(model: nn.Module, config: ModelConfig) -> Iterator[tuple[str, Weight]]:
    """Every tensor of the checkpoint under its published name, as a view of the model's own."""
    last_mtp = len(config.pattern.mtp) - 1
    for name, tensor in state_tensors(model):
        published = name.replace("mtp.input.", "mtp.layers.0.").replace(
            "mtp.final_layernorm.", f"mtp.layers.{last_mtp}.final_layernorm."
        )
        stem, _, projection = published.rpartition(".")
        if stem.endswith("mixer.experts"):
            for expert, matrix in enumerate(tensor):
                yield f"{stem}.{expert}.{projection}.weight", matrix
        else:
            yield published, tensor


def published_product(name: str) -> str:
    """The published name of the module, or of the stacked parameter, of a product."""
    return name.replace("mtp.input.", "mtp.layers.0.")


def product_of(name: str) -> str:
    """The published product, as `published_product` names it, to which a stored weight belongs."""
    match = _EXPERT.fullmatch(name)
    return f"{match[1]}.{match[2]}" if match else name


def our_spelling(name: str) -> str:
    """A stored tensor's name as this package writes it, without the prefixes of wrappers."""
    name = name.removeprefix("language_model.")
    return "backbone." + name.removeprefix("model.") if name.startswith("model.") else name


def _pattern(fields: Fields) -> LayerPattern:
    """The layer pattern with its MTP depths, from all fields that contain a part of it."""
    spelled = _spelled_layers(fields, "hybrid_override_pattern")
    main = fields.agreed({name: layers.partition("/")[0] for name, layers in spelled.items()})
    if not main:
        names = ", ".join(fields.names("hybrid_override_pattern"))
        raise ConfigError(f"{fields.where} has no layer list under {names}")
    spelled_mtp = _spelled_layers(fields, "mtp_hybrid_override_pattern")
    mtp = fields.agreed(spelled_mtp)
    for name, layers in spelled.items():
        if "/" in layers:  # Megatron's pattern has the depths after the layers
            whole = parse_pattern(layers, _KINDS)
            block = "".join(whole.mtp)
            fields.agreed({f"the prediction block in {name}": block} | spelled_mtp)
            depths = {f"the number of depths in {name}": whole.num_mtp_depths}
            fields.agreed(depths | fields.spelled("num_mtp_depths"))
            return whole
    block = mtp or "*E"
    return parse_pattern("/".join([main] + [block] * _num_depths(fields, main, block)), _KINDS)


def _num_depths(fields: Fields, main: str, block: str) -> int:
    blocks = fields.get(int, "num_nextn_predict_layers", default=0)
    if blocks < 0:
        raise ConfigError(f"{fields.where}: num_nextn_predict_layers is {blocks}, below 0")
    depths = fields.get(int, "num_mtp_depths", default=blocks)
    if blocks != 1 or fields.raw("num_mtp_depths") is not None:
        return depths if blocks else 0
    for name in ("super", "ultra"):
        published = ModelConfig.preset(name).pattern
        if str(published) == "/".join([main] + [block] * published.num_mtp_depths):
            logger.warning(
                "%s: num_nextn_predict_layers is 1, the one block of %s, which its report trains "
                "for %d depths: these are taken (num_mtp_depths says another number)",
                fields.where,
                name.capitalize(),
                published.num_mtp_depths,
            )
            return published.num_mtp_depths
    return depths


def _spelled_layers(fields: Fields, name: str) -> dict[str, str]:
    """A layer list as a pattern string, for each of its names that is present."""
    return {
        spelling: _as_pattern(fields, spelling, value)
        for spelling, value in fields.spelled(name).items()
    }


def _as_pattern(fields: Fields, name: str, value: Any) -> str:
    if isinstance(value, str):
        parse_pattern(value, _KINDS)  # raises for an unknown layer, before spellings are compared
        return value
    if not isinstance(value, list):
        raise ConfigError(
            f"{fields.where}: {name} is {value!r}, but a pattern or a list of layers is needed"
        )
    unknown = [kind for kind in value if kind not in _BLOCK_TYPES]
    if unknown:
        raise ConfigError(
            f"{fields.where}: layer type {unknown[0]!r} is not one of {', '.join(_BLOCK_TYPES)}"
        )
    return "".join(_BLOCK_TYPES[kind] for kind in value)


def _mamba(fields: Fields) -> MambaConfig:
    return MambaConfig(
        mamba_num_heads=fields.get(int, "mamba_num_heads"),
        mamba_head_dim=fields.get(int, "mamba_head_dim"),
        ssm_state_size=fields.get(int, "ssm_state_size"),
        n_groups=fields.get(int, "n_groups"),
        conv_kernel=fields.get(int, "conv_kernel", default=4),
        chunk_size=fields.get(int, "chunk_size", default=128),
        time_step_min=fields.get(float, "time_step_min", default=0.001),
        time_step_max=fields.get(float, "time_step_max", default=0.1),
        time_step_floor=fields.get(float, "time_step_floor", default=1e-4),
    )


def _attention(fields: Fields) -> AttentionConfig:
    heads = fields.get(int, "num_attention_heads")
    return AttentionConfig(
        num_attention_heads=heads,
        num_key_value_heads=fields.get(int, "num_key_value_heads", default=heads),
        # There is no default: in this family it is not hidden_size / num_attention_heads.
        head_dim=fields.get(int, "head_dim"),
    )


def _moe(fields: Fields) -> MoEConfig:
    latent = fields.raw("moe_latent_size")
    shared = fields.get(int, "n_shared_experts", default=1)
    return MoEConfig(
        n_routed_experts=fields.get(int, "n_routed_experts"),
        num_experts_per_tok=fields.get(int, "num_experts_per_tok"),
        moe_intermediate_size=fields.get(int, "moe_intermediate_size"),
        moe_shared_expert_intermediate_size=(
            fields.get(int, "moe_shared_expert_intermediate_size") if shared else 0
        ),
        moe_latent_size=None if latent is None else fields.get(int, "moe_latent_size"),
        routed_scaling_factor=fields.get(float, "routed_scaling_factor", default=1.0),
        norm_topk_prob=fields.get(bool, "norm_topk_prob", default=True),
    )


def _refuse_other_arithmetic(fields: Fields) -> None:
    for name in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias", "residual_in_fp32"):
        fields.require(name, False, "no released model of the family has it")
    fields.require(
        "tie_word_embeddings", False, "transformers never ties this family, whatever the field says"
    )
    fields.require("use_conv_bias", True, "the convolution has a bias in every released model")
    fields.require("mlp_hidden_act", "relu2", "experts and dense layers are squared ReLU")
    fields.require("mamba_hidden_act", "silu", "the convolution is followed by SiLU")
    fields.require("n_group", 1, "experts are chosen from all at once")
    fields.require("topk_group", 1, "experts are chosen from all at once")
    if fields.raw("sliding_window") is not None:
        raise ConfigError(
            f"{fields.where}: sliding_window is set, but attention here sees everything"
        )
    for name, limit in fields.spelled("time_step_limit").items():
        if [number(bound) for bound in limit] != [0.0, float("inf")]:
            raise ConfigError(
                f"{fields.where}: {name} is {limit!r}; only no limit ([0, inf]) is supported, "
                "which is what the released models were trained with"
            )
