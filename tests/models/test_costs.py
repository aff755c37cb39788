"""Costs of the published models, to the last parameter, without a byte of weights."""

import pytest
import torch

from nemotron3.models.cache.mamba_state import MambaState
from nemotron3.models.config import ModelConfig
from nemotron3.models.costs import (
    forward_flops_per_token,
    kv_bytes_per_token,
    model_costs,
    state_bytes_per_sequence,
)
from nemotron3.models.nemotron_h import LanguageModel
from tests.tiny import qwen_config, tiny_config

# Totals without MTP, keys and values per token, SSM and convolution states per sequence:
# the reports and the published configurations.
PUBLISHED = {
    "nano": (31_577_937_344, 6_144, 48.2, 0.85),
    "super": (120_668_687_360, 8_192, 167.8, 2.5),
    "ultra": (549_308_968_960, 12_288, 402.7, 5.3),
}
ACTIVE = {"nano": 3.2e9, "super": 12e9, "ultra": 55e9}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config = ModelConfig.preset(name)
    total, kv, states_mb, tails_mb = PUBLISHED[name]
    assert model_costs(config).total == total
    assert kv_bytes_per_token(config) == kv
    states, conv_states = state_bytes_per_sequence(config)
    assert states / 1e6 == pytest.approx(states_mb, abs=0.05)
    assert conv_states / 1e6 == pytest.approx(tails_mb, abs=0.05)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_active_sizes(name):
    assert model_costs(ModelConfig.preset(name)).total_active == pytest.approx(
        ACTIVE[name], rel=0.07
    )


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("ME*-E/*E/*E"),
        tiny_config("ME*-E/*E/*E", tie_word_embeddings=True),
        tiny_config("M*"),
        tiny_config("E", moe={"moe_latent_size": None, "moe_shared_expert_intermediate_size": 0}),
        qwen_config(),
    ],
    ids=["whole", "tied", "without experts", "plain experts", "transformer"],
)
def test_every_parameter_is_counted_once(config):
    costs = model_costs(config)
    model = LanguageModel.from_config(config)
    assert costs.total + costs.mtp_parameters == sum(p.numel() for p in model.parameters())
    assert costs.active.keys() >= costs.parameters.keys()


def test_active_parameters_are_those_a_token_passes():
    config = tiny_config("E")
    moe = config.moe
    assert moe is not None
    costs = model_costs(config)
    one_expert = 2 * moe.moe_latent_size * moe.moe_intermediate_size
    assert costs.parameters["routed experts"] == 8 * one_expert
    assert costs.active["routed experts"] == 3 * one_expert
    idle = costs.parameters["embedding"] + 5 * one_expert
    assert costs.total_active == costs.total - idle
    tied = model_costs(tiny_config("E", tie_word_embeddings=True))
    assert tied.total_active == costs.total_active  # the same products


def test_flops_of_attention_and_scan_by_hand():
    """At 9 tokens: two per active weight, scores and sums over 5 keys on average, the scan."""
    config = tiny_config("M*")
    mamba, attention = config.mamba, config.attention
    assert mamba is not None
    assert attention is not None
    matrices = 2 * model_costs(config).total_active
    keys = (9 + 1) / 2
    looks = 2 * 2 * attention.num_attention_heads * attention.head_dim * keys
    inner, state, chunk = 48, 10, 8
    scan = 2 * mamba.n_groups * state * chunk + 2 * inner * chunk + 4 * inner * state
    assert forward_flops_per_token(config, context=9) == matrices + looks + scan


def test_mtp_adds_its_block_and_an_output_layer_for_each_depth():
    one, two = (tiny_config("M*E" + "/*E" * depths) for depths in (1, 2))
    plain = forward_flops_per_token(one, context=64)
    first = forward_flops_per_token(one, context=64, with_mtp=True) - plain
    both = forward_flops_per_token(two, context=64, with_mtp=True) - plain
    assert both == pytest.approx(2 * first)
    assert first > 2 * one.vocab_size * one.hidden_size


def test_state_matches_what_the_model_carries():
    config = tiny_config("MEM*E")
    with torch.inference_mode():
        state = LanguageModel.from_config(config).new_state(1)
    states, conv_states = state_bytes_per_sequence(config, conv_itemsize=4)
    mamba = [layer for layer in state.layers if isinstance(layer, MambaState)]
    assert sum(layer.ssm_states[0].nbytes for layer in mamba) == states
    assert sum(layer.conv_states.nbytes for layer in mamba) == conv_states
