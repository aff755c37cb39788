"""Configurations that cannot be built: each is refused with the field and what to do."""

import dataclasses

import pytest

from nemotron3.config.record import from_record, to_record
from nemotron3.errors import ConfigError
from nemotron3.models.config import ModelConfig
from tests.tiny import ATTENTION, MAMBA, MLP, MOE, tiny_config


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (MAMBA, {"mamba_num_heads": 0}, "mamba_num_heads is 0; it must be positive"),
        (MAMBA, {"n_groups": 4}, "mamba_num_heads = 6 is not divisible by n_groups = 4"),
        (MAMBA, {"conv_kernel": 1}, "conv_kernel is 1; a convolution needs at least 2 taps"),
        (MAMBA, {"time_step_min": 0.5}, "time_step_min is 0.5 and time_step_max 0.1"),
        (MAMBA, {"time_step_floor": 0.0}, "time_step_floor is 0.0; it must be positive"),
        (ATTENTION, {"num_key_value_heads": 3}, "= 4 is not divisible by num_key_value_heads = 3"),
        (ATTENTION, {"head_dim": -2}, "head_dim is -2; it must be positive"),
        (ATTENTION, {"head_dim": 5, "rope_theta": 1e4}, "head_dim is 5; .* must be even"),
        (ATTENTION, {"rope_theta": 0.0}, "rope_theta is 0.0; it must be positive"),
        (MOE, {"num_experts_per_tok": 9}, "cannot choose more experts than there are"),
        (MOE, {"moe_shared_expert_intermediate_size": -1}, "0 means no shared expert"),
        (MOE, {"moe_latent_size": 0}, "moe_latent_size is 0; it must be positive"),
        (MOE, {"activation": "relu"}, "activation is 'relu'; choose from relu2, swiglu"),
        (MOE, {"scoring": "tanh"}, "scoring is 'tanh'; choose from sigmoid, softmax"),
        (MLP, {"intermediate_size": 0}, "intermediate_size is 0; it must be positive"),
        (MLP, {"activation": "gelu"}, "activation is 'gelu'; choose from relu2, swiglu"),
    ],
)
def test_a_part_that_cannot_be_built_is_refused(part, change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(part, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0; it must be positive"),
        ({"initializer_range": 0.0}, "initializer_range is 0.0; it must be positive"),
        ({"mamba": None}, r"has 'M' layers but ModelConfig\.mamba is None; describe them there"),
        ({"mlp": MLP}, r"ModelConfig\.mlp is set but .* has no '-' layer.*; remove it"),
        ({"hybrid_override_pattern": "ME+"}, "'\\+' at position 2"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny_config("MEM*E"), **change)


def test_parts_of_the_prediction_block_count_too():
    with pytest.raises(ConfigError, match=r"has '\*' layers but ModelConfig\.attention is None"):
        dataclasses.replace(tiny_config("ME"), hybrid_override_pattern="ME/*E")


def test_the_published_rule_for_the_initial_spread():
    published = {"nano": 0.0173, "super": 0.014, "ultra": 0.0099}
    for name, std in published.items():
        assert ModelConfig.preset(name).init_std == pytest.approx(std, rel=0.005)
    assert tiny_config("M", initializer_range=0.02).init_std == 0.02


@pytest.mark.parametrize("config", [tiny_config(), ModelConfig.preset("qwen3-moe")])
def test_a_configuration_survives_its_record(config):
    assert from_record(ModelConfig, to_record(config)) == config
