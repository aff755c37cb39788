"""What a model costs, known from its configuration alone: parameters, state, arithmetic.

Parameters are counted on the real modules, built without memory, so the count is right by
construction. FLOPs are those of the products, two per multiply-add, as everyone counts them; the
formula is spelled out because published ones differ (Megatron sizes the Mamba inner width as twice
the model's, which overstates Nano by 7 %).
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from nemotron3.models.attention import Attention
from nemotron3.models.block import Block
from nemotron3.models.config import AttentionConfig, MambaConfig, ModelConfig
from nemotron3.models.experts import MixtureOfExperts
from nemotron3.models.mamba2 import Mamba2Mixer
from nemotron3.models.mlp import MLP
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.pattern import LayerKind


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """The costs of a model, by part."""

    parameters: dict[str, int]
    """Parameters of the backbone by part; multi-token prediction is not among them."""
    active: dict[str, int]
    """Parameters that one token passes, by part."""
    mtp_parameters: int
    """Parameters of the multi-token-prediction block."""
    mtp_active: int
    """Of these, what one token passes at one depth."""

    @property
    def total(self) -> int:
        """All parameters without multi-token prediction, as the reports count them."""
        return sum(self.parameters.values())

    @property
    def total_active(self) -> int:
        """Active parameters with the output layer and without the input table (3.2B for Nano)."""
        return sum(self.active.values()) - self.active.get("embedding", 0)


def model_costs(config: ModelConfig) -> ModelCosts:
    """Count the parameters of a configuration without allocating them."""
    with torch.device("meta"):
        model = LanguageModel(config)
    parameters: Counter[str] = Counter(embedding=_count(model.backbone.embeddings))
    for layer in model.backbone.layers:
        assert isinstance(layer, Block)
        parameters.update(_layer_parts(layer))
    parameters["norms"] += _count(model.backbone.norm_f)
    if model.lm_head is not None:
        parameters["output layer"] = _count(model.lm_head)
    mtp_parts: Counter[str] = Counter()
    if model.mtp is not None:
        mtp_parts["mtp input"] = _count(model.mtp.input) + _count(model.mtp.final_layernorm)
        for layer in model.mtp.layers:
            assert isinstance(layer, Block)
            mtp_parts.update(_layer_parts(layer))
    active = _active(parameters, config)
    if config.tie_word_embeddings:
        active["output layer"] = parameters["embedding"]
    return ModelCosts(
        parameters=dict(parameters),
        active=active,
        mtp_parameters=sum(mtp_parts.values()),
        mtp_active=sum(_active(mtp_parts, config).values()),
    )


def kv_bytes_per_token(config: ModelConfig, *, itemsize: int = 2) -> int:
    """Bytes of keys and values that one token adds to the state (bfloat16 by default)."""
    attention = config.attention
    if attention is None:
        return 0
    layers = config.pattern.main.count(LayerKind.ATTENTION)
    return layers * 2 * attention.num_key_value_heads * attention.head_dim * itemsize


def state_bytes_per_sequence(config: ModelConfig, *, conv_itemsize: int = 2) -> tuple[int, int]:
    """Bytes of (scan states, convolution states) that one sequence keeps at any length.

    Scan states are float32; convolution states have the dtype of activations.
    """
    mamba = config.mamba
    if mamba is None:
        return 0, 0
    layers = config.pattern.main.count(LayerKind.MAMBA)
    states = mamba.mamba_num_heads * mamba.mamba_head_dim * mamba.ssm_state_size * 4
    conv_states = (mamba.conv_kernel - 1) * mamba.conv_channels * conv_itemsize
    return layers * states, layers * conv_states


def forward_flops_per_token(config: ModelConfig, *, context: int, with_mtp: bool = False) -> float:
    """FLOPs of the forward pass for one token, averaged over a sequence of `context` tokens.

    Two per active matrix element (the input table is looked up, not multiplied), plus causal
    attention, which on average sees half the sequence, plus the chunked scan. Training takes three
    times as much. With MTP, each trained depth adds its block and one more output layer.
    """
    costs = model_costs(config)
    flops = 2.0 * costs.total_active
    for kind in config.pattern.main:
        flops += _mixing_flops(kind, config, context)
    if with_mtp:
        output = config.vocab_size * config.hidden_size
        depth = 2.0 * (costs.mtp_active + output)
        depth += sum(_mixing_flops(kind, config, context) for kind in config.pattern.mtp)
        flops += config.pattern.num_mtp_depths * depth
    return flops


def _mixing_flops(kind: LayerKind, config: ModelConfig, context: int) -> float:
    if kind is LayerKind.ATTENTION:
        assert config.attention is not None
        return _attention_flops(config.attention, context)
    if kind is LayerKind.MAMBA:
        assert config.mamba is not None
        return _scan_flops(config.mamba, context)
    return 0.0


def _attention_flops(config: AttentionConfig, context: int) -> float:
    return 2 * 2 * config.num_attention_heads * config.head_dim * (context + 1) / 2


def _scan_flops(config: MambaConfig, context: int) -> float:
    chunk = min(config.chunk_size, context)
    scores = 2 * config.n_groups * config.ssm_state_size * chunk
    within = 2 * config.inner_size * chunk
    states = 2 * 2 * config.inner_size * config.ssm_state_size
    return scores + within + states


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_parts(layer: Block) -> Counter[str]:
    parts: Counter[str] = Counter(norms=_count(layer.norm))
    mixer = layer.mixer
    match mixer:
        case Mamba2Mixer():
            parts["mamba"] = _count(mixer)
        case Attention():
            parts["attention"] = _count(mixer)
        case MLP():
            parts["dense feed-forward"] = _count(mixer)
        case MixtureOfExperts():
            parts["router"] = _count(mixer.gate)
            parts["routed experts"] = _count(mixer.experts)
            if mixer.shared_experts is not None:
                parts["shared experts"] = _count(mixer.shared_experts)
            if mixer.fc1_latent_proj is not None and mixer.fc2_latent_proj is not None:
                parts["latent projections"] = _count(mixer.fc1_latent_proj)
                parts["latent projections"] += _count(mixer.fc2_latent_proj)
    return parts


def _active(parts: Counter[str], config: ModelConfig) -> dict[str, int]:
    active = dict(parts)
    if config.moe is not None and "routed experts" in active:
        share = config.moe.num_experts_per_tok
        active["routed experts"] = active["routed experts"] * share // config.moe.n_routed_experts
    return active
