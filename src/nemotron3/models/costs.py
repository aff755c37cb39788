"""The costs of a model, from its configuration alone: parameters, bytes of state, FLOPs.

Parameters are counted on the model's modules, built without memory. FLOPs are those of matrix
products, two per multiply-add. The formula is written out because published ones differ (Megatron
assumes a Mamba inner width of twice the model's, which overstates Nano by 7 %).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from nemotron3.models.block import Block
from nemotron3.models.config import ModelConfig
from nemotron3.models.mixer import ParameterCount
from nemotron3.models.nemotron_h import LanguageModel


@dataclass(frozen=True, kw_only=True)
class ModelCosts:
    """The costs of a model, by part."""

    parameters: dict[str, int]
    """Parameters by part, without multi-token prediction."""
    active: dict[str, int]
    """Parameters that are used for one token, by part."""
    mtp_parameters: int
    """Parameters of the multi-token-prediction block."""
    mtp_active: int
    """Parameters of that block that are used for one token at one depth."""

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
    parts = {"embedding": ParameterCount.of(model.backbone.embeddings)}
    _add(parts, _layer_parts(model.backbone.layers))
    _add(parts, {"norms": ParameterCount.of(model.backbone.norm_f)})
    if model.lm_head is not None:
        parts["output layer"] = ParameterCount.of(model.lm_head)
    active = {part: count.active for part, count in parts.items()}
    if config.tie_word_embeddings:
        active["output layer"] = active["embedding"]
    mtp: dict[str, ParameterCount] = {}
    if model.mtp is not None:
        around = ParameterCount.of(nn.ModuleList([model.mtp.input, model.mtp.final_layernorm]))
        _add(mtp, {"mtp input": around})
        _add(mtp, _layer_parts(model.mtp.layers))
    return ModelCosts(
        parameters={part: count.total for part, count in parts.items()},
        active=active,
        mtp_parameters=sum(count.total for count in mtp.values()),
        mtp_active=sum(count.active for count in mtp.values()),
    )


def kv_bytes_per_token(config: ModelConfig, *, itemsize: int = 2, with_mtp: bool = False) -> int:
    """Bytes of keys and values that one token adds to the state (bfloat16 by default)."""
    layers = chain(config.layers, config.mtp_layers if with_mtp else ())
    return itemsize * sum(mixer.state_size.per_token for mixer in layers)


def state_bytes_per_sequence(config: ModelConfig, *, conv_itemsize: int = 2) -> tuple[int, int]:
    """Bytes of (SSM states, convolution states) of one sequence, at any length.

    SSM states are float32; convolution states have the dtype of activations.
    """
    sizes = [mixer.state_size for mixer in config.layers]
    states = 4 * sum(size.accumulated for size in sizes)
    return states, conv_itemsize * sum(size.activations for size in sizes)


def forward_flops_per_token(config: ModelConfig, *, context: int, with_mtp: bool = False) -> float:
    """FLOPs of the forward pass for one token, averaged over a sequence of `context` tokens.

    They are the sum of two per active matrix element (except the embedding, which is a lookup),
    causal attention over half the sequence on average, and the chunked scan. Training takes three
    times as many. With MTP, each trained depth adds its block and the output layer.
    """
    costs = model_costs(config)
    flops = 2.0 * costs.total_active
    flops += sum(mixer.mixing_flops(context) for mixer in config.layers)
    if with_mtp:
        output = config.vocab_size * config.hidden_size
        depth = 2.0 * (costs.mtp_active + output)
        depth += sum(mixer.mixing_flops(context) for mixer in config.mtp_layers)
        flops += config.pattern.num_mtp_depths * depth
    return flops


def _layer_parts(layers: nn.ModuleList) -> dict[str, ParameterCount]:
    parts: dict[str, ParameterCount] = {}
    for layer in layers:
        assert isinstance(layer, Block)
        _add(parts, {"norms": ParameterCount.of(layer.norm)})
        _add(parts, layer.mixer.parameter_counts())
    return parts


def _add(parts: dict[str, ParameterCount], more: Mapping[str, ParameterCount]) -> None:
    """Add the counts of parts to those of the same name."""
    for part, count in more.items():
        have = parts.get(part, ParameterCount(0, 0))
        parts[part] = ParameterCount(have.total + count.total, have.active + count.active)
