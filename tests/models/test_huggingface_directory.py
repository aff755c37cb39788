"""Model directories: what is written comes back, and what is wrong is named."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.config import ModelConfig
from nemotron3.models.huggingface import nemotron_h, read_config
from nemotron3.models.nemotron_h import LanguageModel
from tests.tiny import qwen_config, tiny_config, tiny_model, tokens_for

MODELS = {
    "hybrid with prediction": tiny_config("MEM*E-/*E/*E"),
    "one-layer prediction block": tiny_config("ME/*/*/*"),
    "no latent": tiny_config("M*E", moe={"moe_latent_size": None}),
}
NATIVE = {
    "tied hybrid": tiny_config("ME*", tie_word_embeddings=True),
    "SwiGLU hybrid": tiny_config(
        "ME-/*E", moe={"activation": "swiglu"}, mlp={"activation": "swiglu"}
    ),
    "no shared expert": tiny_config("ME", moe={"moe_shared_expert_intermediate_size": 0}),
    "rotary hybrid": tiny_config("M*", attention={"rope_theta": 1e4}),
    "softmax router": tiny_config("*E", moe={"scoring": "softmax"}),
    "transformer with prediction": replace(qwen_config(), hybrid_override_pattern="*E*E/*E/*E"),
    "dense transformer": tiny_config("*-", attention={"qk_norm": True}),
}


TRANSFORMERS = {
    "transformer": qwen_config(),
    "tied transformer": qwen_config(tie_word_embeddings=True),
}


def without_selection_biases(model: LanguageModel) -> LanguageModel:
    for router in model.routers:
        router.e_score_correction_bias.zero_()
    return model


def saved(tmp_path, pattern="MEM*E/*E/*E", **options) -> Path:
    tiny_model(pattern).save_pretrained(tmp_path, **options)
    return tmp_path


def change_config(path: Path, **fields) -> None:
    file = path / "config.json"
    record = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in record.items() if v is not Ellipsis}))


def change_weights(path: Path, change) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def assert_same(model: LanguageModel, other: LanguageModel) -> None:
    expected = model.state_dict()
    actual = other.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype, name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("config", (MODELS | NATIVE).values(), ids=MODELS | NATIVE)
def test_what_is_written_comes_back(tmp_path, config):
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    read = LanguageModel.from_pretrained(tmp_path)
    assert read.config.hybrid_override_pattern == config.hybrid_override_pattern
    tokens = tokens_for(config, 1, 9)
    with torch.no_grad():
        assert torch.equal(read(tokens), model(tokens))
    assert_same(model, read)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("config", TRANSFORMERS.values(), ids=TRANSFORMERS)
def test_a_transformer_comes_back_in_its_own_layout_or_else_with_its_biases(tmp_path, config):
    """Qwen's layout has no place for a selection bias; a model that has learnt one takes ours."""
    for name, model in {
        "qwen3_moe": without_selection_biases(tiny_model(config)),
        "nemotron3": tiny_model(config),
    }.items():
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
        assert_same(model, LanguageModel.from_pretrained(tmp_path))


@pytest.mark.parametrize("config", (MODELS | TRANSFORMERS).values(), ids=MODELS | TRANSFORMERS)
def test_only_derived_fields_of_the_config_change(tmp_path, config):
    model = without_selection_biases(tiny_model(config))
    model.save_pretrained(tmp_path)
    read = read_config(tmp_path)
    assert read.initializer_range == pytest.approx(config.init_std)
    assert read.mamba == config.mamba
    assert read.attention == config.attention
    assert read.moe == config.moe
    assert read.mlp == config.mlp
    names = ("vocab_size", "hidden_size", "layer_norm_epsilon", "max_position_embeddings")
    for name in (*names, "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
        assert getattr(read, name) == getattr(config, name), name


@pytest.mark.parametrize("config", NATIVE.values(), ids=NATIVE)
def test_what_no_published_layout_expresses_says_so(tmp_path, config):
    """Another reader must fail on it, not load it as something else."""
    tiny_model(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "nemotron3"
    assert read_config(tmp_path) == config


def test_the_files_are_those_of_the_published_layout(tmp_path):
    saved(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "MEM*E",
        "layers_block_type": ["mamba", "moe", "mamba", "attention", "moe"],
        "mtp_hybrid_override_pattern": "*E",
        "num_nextn_predict_layers": 1,
        "num_hidden_layers": 5,
        "time_step_limit": [0.0, 1e30],
        "torch_dtype": "float32",
        "n_shared_experts": 1,
    }
    assert {name: config[name] for name in expected} == expected
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2
    names = set(load_file(tmp_path / "model.safetensors"))
    for part in (
        "backbone.embeddings.weight",
        "backbone.norm_f.weight",
        "backbone.layers.0.norm.weight",
        "backbone.layers.0.mixer.conv1d.bias",
        "backbone.layers.0.mixer.norm.weight",
        "backbone.layers.1.mixer.gate.e_score_correction_bias",
        "backbone.layers.1.mixer.experts.7.up_proj.weight",
        "backbone.layers.1.mixer.fc2_latent_proj.weight",
        "backbone.layers.1.mixer.shared_experts.down_proj.weight",
        "backbone.layers.3.mixer.o_proj.weight",
        "lm_head.weight",
        "mtp.layers.0.enorm.weight",
        "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.mixer.q_proj.weight",
        "mtp.layers.1.final_layernorm.weight",
        "mtp.layers.1.mixer.experts.0.down_proj.weight",
    ):
        assert part in names


def test_shards_stay_below_their_limit_and_are_indexed(tmp_path):
    model = tiny_model()
    limit = 60_000
    model.save_pretrained(tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    assert_same(model, LanguageModel.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same(model, LanguageModel.from_pretrained(tmp_path))


def stacked(tensors):
    """The experts in one tensor, as in transformers' memory."""
    for projection in ("up_proj", "down_proj"):
        names = [n for n in tensors if ".experts." in n and n.endswith(f"{projection}.weight")]
        for stem in {name.partition(".experts.")[0] for name in names}:
            parts = [tensors.pop(f"{stem}.experts.{e}.{projection}.weight") for e in range(8)]
            tensors[f"{stem}.experts.{projection}"] = torch.stack(parts)


def renamed(old, new):
    def change(tensors):
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    "change",
    [
        stacked,
        renamed("backbone.", "model."),
        renamed("", "language_model."),
        lambda tensors: (renamed("backbone.", "model.")(tensors), stacked(tensors)),
        lambda tensors: (
            renamed("backbone.", "model.")(tensors),
            renamed("", "language_model.")(tensors),
        ),
    ],
    ids=["stacked", "model", "language_model", "model stacked", "language_model.model"],
)
def test_tensors_are_known_by_every_name_in_circulation(tmp_path, change):
    model = tiny_model()
    saved(tmp_path)
    change_weights(tmp_path, change)
    assert_same(model, LanguageModel.from_pretrained(tmp_path))


LISTS = {
    "mamba": ["mamba", "moe", "mamba", "attention", "moe"],
    "linear": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
}


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_block_type": ...},
        {"hybrid_override_pattern": ..., "layers_block_type": LISTS["mamba"]},
        {"hybrid_override_pattern": ..., "layers_block_type": LISTS["linear"]},
        {"hybrid_override_pattern": ..., "layers_block_type": ..., "layer_types": LISTS["linear"]},
        {"mtp_hybrid_override_pattern": ..., "mtp_layers_block_type": ["attention", "moe"]},
        {"mtp_hybrid_override_pattern": ..., "mtp_layers_block_type": ["full_attention", "moe"]},
        {"mtp_hybrid_override_pattern": ..., "mtp_layers_block_type": ...},
        {"time_step_limit": [0.0, float("inf")]},
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {"time_step_limit": [0, "Infinity"]},
        {"time_step_limit": ...},
        {"time_step_limit": ..., "mamba_dt_limit": [0.0, 1e30]},
        {"eos_token_id": [2]},
        {"layer_types": LISTS["linear"]},
        {"layers_block_type": LISTS["linear"], "layer_types": LISTS["mamba"]},
        {"norm_eps": 1e-5, "rms_norm_eps": 1e-5},
        {"hybrid_override_pattern": "MEM*E/*E/*E"},
        {
            "hybrid_override_pattern": "MEM*E/*E/*E",
            "layers_block_type": ...,
            "num_nextn_predict_layers": ...,
            "num_mtp_depths": ...,
        },
        {"num_hidden_layers": ...},
        {"rope_theta": 10_000, "partial_rotary_factor": 1.0, "expand": 2},
    ],
    ids=str,
)
def test_every_spelling_of_a_field_means_the_same(tmp_path, fields):
    expected = read_config(saved(tmp_path))
    change_config(tmp_path, **fields)
    assert read_config(tmp_path) == expected


ALIAS_PAIRS = [(name, alias) for name, aliases in nemotron_h.ALIASES.items() for alias in aliases]


@pytest.fixture
def distinct(tmp_path):
    """A saved model none of whose fields has its default."""
    config = tiny_config(
        mamba={
            "conv_kernel": 3,
            "time_step_min": 0.002,
            "time_step_max": 0.2,
            "time_step_floor": 2e-4,
        },
        layer_norm_epsilon=3e-5,
    )
    tiny_model(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "alias"), ALIAS_PAIRS)
def test_aliases_are_read_alone_and_beside_the_name(distinct, name, alias):
    expected = read_config(distinct)
    value = json.loads((distinct / "config.json").read_text())[name]
    change_config(distinct, **{alias: value})
    assert read_config(distinct) == expected
    others = {other: ... for other in nemotron_h.ALIASES[name] if other != alias}
    change_config(distinct, **{name: ...} | others)
    assert read_config(distinct) == expected
    assert read_config(distinct).layer_norm_epsilon == 3e-5


OTHER_VALUES = {
    "hybrid_override_pattern": "MEM*M",
    "mtp_hybrid_override_pattern": "*-",
    "time_step_limit": [0.0, 1.0],
    "use_conv_bias": False,
}


@pytest.mark.parametrize(("name", "alias"), ALIAS_PAIRS)
def test_two_names_with_two_values_are_refused_by_both(distinct, name, alias):
    value = json.loads((distinct / "config.json").read_text())[name]
    change_config(distinct, **dict.fromkeys(nemotron_h.ALIASES[name]))
    other = OTHER_VALUES.get(name) or (False if name == "use_conv_bias" else 2 * value)
    for first, second in ((value, other), (other, value)):
        change_config(distinct, **{name: first, alias: second})
        with pytest.raises(ConfigError) as raised:
            read_config(distinct)
        if name in ("time_step_limit", "use_conv_bias"):  # one of the two is refused for itself
            assert (alias if second == other else name) + " is " in str(raised.value)
        else:
            assert f"{name} is {first!r} and {alias} is {second!r}" in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"layers_block_type": ["mamba", "moe", "moe", "attention", "moe"]},
            "hybrid_override_pattern is 'MEM\\*E' and layers_block_type is 'MEE\\*E'",
        ),
        (
            {"hybrid_override_pattern": ..., "layer_types": ["moe"]},
            "layers_block_type is 'MEM\\*E' and layer_types is 'E'",
        ),
        (
            {"mtp_layers_block_type": ["moe"]},
            "mtp_hybrid_override_pattern is '\\*E' and mtp_layers_block_type is 'E'",
        ),
        (
            {"hybrid_override_pattern": "MEM*E/*/*", "layers_block_type": ...},
            "block in hybrid_override_pattern is '\\*' and mtp_hybrid_override_pattern is '\\*E'",
        ),
        (
            {"hybrid_override_pattern": "MEM*E/*E", "layers_block_type": ...},
            "number of depths in hybrid_override_pattern is 1 and num_mtp_depths is 2",
        ),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is -1, below 0"),
        ({"eos_token_id": []}, r"eos_token_id is \[\], but an id or a list of ids"),
        ({"eos_token_id": [2, "x"]}, r"eos_token_id is \[2, 'x'\], but an id or a list of ids"),
        ({"layers_block_type": 5}, "layers_block_type is 5, but a pattern or a list"),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_are_refused_by_both(tmp_path, fields, message):
    saved(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize("nest", ["llm_config", "text_config"])
def test_the_language_model_inside_a_larger_one_is_found(tmp_path, nest):
    expected = read_config(saved(tmp_path))
    file = tmp_path / "config.json"
    inner = json.loads(file.read_text())
    file.write_text(json.dumps({"model_type": "NemotronH_Omni", nest: inner}))
    assert read_config(tmp_path) == expected


COMMON = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 128,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262_144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_group": 1,
    "n_groups": 8,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10_000,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131_072,
}
PUBLISHED = {
    "nano": COMMON
    | {
        "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "num_hidden_layers": 52,
        "hidden_size": 2688,
        "intermediate_size": 1856,
        "num_attention_heads": 32,
        "mamba_num_heads": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
        "routed_scaling_factor": 2.5,
        "time_step_limit": [0.0, float("inf")],
    },
    "super": COMMON
    | {
        "hybrid_override_pattern": (
            "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
            "EMEMEMEM*EMEMEMEME"
        ),
        "num_hidden_layers": 88,
        "hidden_size": 4096,
        "intermediate_size": 2688,
        "num_attention_heads": 32,
        "mamba_num_heads": 128,
        "n_routed_experts": 512,
        "num_experts_per_tok": 22,
        "moe_intermediate_size": 2688,
        "moe_shared_expert_intermediate_size": 5376,
        "moe_latent_size": 1024,
        "routed_scaling_factor": 5,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    },
}


PUBLISHED["ultra"] = PUBLISHED["super"] | {
    "hybrid_override_pattern": None,
    "layers_block_type": [
        {"M": "mamba", "E": "moe", "*": "attention"}[kind]
        for kind in ModelConfig.preset("ultra").pattern.main
    ],
    "num_hidden_layers": 108,
    "hidden_size": 8192,
    "intermediate_size": 5120,
    "num_attention_heads": 64,
    "mamba_num_heads": 256,
    "moe_intermediate_size": 5120,
    "moe_shared_expert_intermediate_size": 10_240,
    "moe_latent_size": 2048,
    "mtp_hybrid_override_pattern": None,
    "mtp_layers_block_type": ["attention", "moe"],
    "time_step_limit": [0.0, 1e30],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_preset(tmp_path, caplog, name):
    """One physical prediction block is trained for two depths, and reading the file says so."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    preset = ModelConfig.preset(name)
    assert read_config(tmp_path) == replace(preset, initializer_range=0.02)
    depths = [record.getMessage() for record in caplog.records]
    assert len(depths) == (name != "nano")
    assert all("num_nextn_predict_layers is 1" in line and "2 depths" in line for line in depths)


@pytest.mark.parametrize(("depths", "expected"), [(1, 1), (3, 3)])
def test_a_file_that_says_its_depths_has_them(tmp_path, caplog, depths, expected):
    record = PUBLISHED["super"] | {"num_mtp_depths": depths}
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert read_config(tmp_path).pattern.num_mtp_depths == expected
    assert not caplog.records


def test_other_layers_have_the_depths_that_the_file_counts(tmp_path, caplog):
    saved(tmp_path)
    change_config(tmp_path, num_mtp_depths=...)
    assert read_config(tmp_path).pattern.num_mtp_depths == 1
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; readable are nemotron_h, qwen3_moe"),
        ({"vocab_size": ...}, "lacks vocab_size"),
        ({"n_groups": ...}, r"lacks n_groups \(or mamba_n_groups"),
        ({"head_dim": ...}, "lacks head_dim"),
        ({"hidden_size": "64"}, "hidden_size is '64', but a int is needed"),
        ({"hidden_size": True}, "hidden_size is True, but a int is needed"),
        ({"num_hidden_layers": 7}, "num_hidden_layers is 7, but the layer list 'MEM\\*E' has 5"),
        ({"hybrid_override_pattern": "MEX*E"}, "'X' at position 2"),
        (
            {"hybrid_override_pattern": ..., "layers_block_type": ["mamba", "gru"]},
            "layer type 'gru' is not one of mamba",
        ),
        ({"hybrid_override_pattern": ..., "layers_block_type": ...}, "has no layer list under"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"mlp_bias": True}, "mlp_bias is True; only False"),
        ({"use_bias": True}, "use_bias is True; only False"),
        ({"mamba_proj_bias": True}, "mamba_proj_bias is True; only False"),
        ({"residual_in_fp32": True}, "residual_in_fp32 is True; only False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False"),
        ({"use_conv_bias": False}, "use_conv_bias is False; only True"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'; only 'relu2'"),
        ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act is 'gelu'; only 'silu'"),
        ({"n_group": 4}, "n_group is 4; only 1"),
        ({"topk_group": 2}, "topk_group is 2; only 1"),
        ({"sliding_window": 512}, "sliding_window is set"),
        ({"time_step_limit": [0.001, 0.1]}, r"time_step_limit is \[0.001, 0.1\]; only no limit"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized by gptq"),
    ],
    ids=str,
)
def test_a_config_we_cannot_run_is_refused_by_field(tmp_path, fields, message):
    saved(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ConfigError, match=message):
        LanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers is set"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rotary type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rotary type 'llama3' is not supported"),
        (
            {"rope_parameters": {"rope_theta": 5.0}},
            r"rope_theta is 10000.0 and rope_parameters.rope_theta is 5.0, two names",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": ...}, "lacks rope_theta"),
        ({"rope_theta": "x"}, "rope_theta is 'x', but a float"),
        ({"rope_scaling": 2}, "rope_scaling is 2, but an object is needed"),
        ({"num_local_experts": 3}, "num_experts is 8 and num_local_experts is 3"),
        ({"norm_eps": 1e-3}, "rms_norm_eps is 1e-06 and norm_eps is 0.001"),
    ],
    ids=str,
)
def test_a_transformer_we_cannot_run_is_refused_by_field(tmp_path, fields, message):
    without_selection_biases(tiny_model(qwen_config())).save_pretrained(tmp_path)
    change_config(tmp_path, **fields)
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist; name a directory"), ("{", "is not JSON"), ("[]", "no JSON object")],
)
def test_a_directory_without_a_config_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


NORM = "backbone.layers.1.norm.weight"
EXPERT = "backbone.layers.1.mixer.experts.5.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NORM), f"lacks 1 tensors .* first '{NORM}'"),
        (lambda t: t.pop(EXPERT), f"lacks 1 tensors .* first '{EXPERT}'"),
        (lambda t: t.update(surprise=torch.ones(2)), "holds 1 tensors .* first 'surprise'"),
        (lambda t: t.update({NORM: t[NORM][:-1].clone()}), rf"'{NORM}' has shape \(63,\).*\(64,\)"),
        (
            lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}),
            rf"'{EXPERT}' has shape \(24, 32\), but config.json calls for \(32, 24\)",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
            f"'{EXPERT}' is stored as torch.float8_e4m3fn, and its scale '{EXPERT}_scale'",
        ),
        (
            lambda t: t.update(
                {
                    EXPERT: torch.zeros(32, 12, dtype=torch.uint8),
                    f"{EXPERT}_scale": torch.ones(32, 2).to(torch.float8_e4m3fn),
                    f"{EXPERT}_scale_2": torch.ones(()),
                }
            ),
            f"is plain and '{EXPERT}' nvfp4; the experts of a layer",
        ),
        (
            lambda t: (stacked(t), t.update({f"{EXPERT[:34]}x": torch.ones(1)})),
            "holds 1 tensors",
        ),
        (
            lambda t: (
                stacked(t),
                t.update(
                    {
                        "backbone.layers.1.mixer.experts.up_proj": torch.ones(7, 24, 32),
                    }
                ),
            ),
            r"experts.up_proj' has shape \(7, 24, 32\), but config.json calls for \(8, 24, 32\)",
        ),
    ],
    ids=["missing", "expert", "extra", "short", "transposed", "fp8", "nvfp4", "stray", "stack"],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    saved(tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        LanguageModel.from_pretrained(tmp_path)


def test_a_truncated_shard_is_named(tmp_path):
    saved(tmp_path, max_shard_bytes=60_000)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=f"{shard.name}.*truncated"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_dtype_is_chosen_at_loading_and_the_scan_stays_float32(tmp_path):
    model = tiny_model()
    saved(tmp_path)
    read = LanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    stored_as_bfloat16 = tmp_path / "bf16"
    read.save_pretrained(stored_as_bfloat16)
    assert json.loads((stored_as_bfloat16 / "config.json").read_text())["dtype"] == "bfloat16"
    again = LanguageModel.from_pretrained(stored_as_bfloat16)
    assert_same(read, again)
    for name, tensor in again.state_dict().items():
        original = model.state_dict()[name]
        if name.endswith(("A_log", "D", "dt_bias", "e_score_correction_bias", "gate.weight")):
            assert torch.equal(tensor, original), name
        else:
            assert torch.equal(tensor, original.bfloat16()), name


PEAK = """
import json, resource, sys, torch
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
LanguageModel.from_config(ModelConfig.preset("tiny")).save_pretrained(sys.argv[1] + "/warm")
LanguageModel.from_pretrained(sys.argv[1] + "/warm")
before = peak_bytes()
for dtype in (torch.bfloat16, torch.float32):  # the smaller first: the peak never falls
    model = LanguageModel.from_pretrained(sys.argv[1], dtype=dtype)
    print(json.dumps([peak_bytes() - before, sum(t.nbytes for t in model.state_dict().values())]))
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux alone")
def test_loading_needs_the_model_and_one_shard(tmp_path):
    shard = 20_000_000
    config = tiny_config(
        "MEEE", hidden_size=512, vocab_size=8192, moe={"moe_intermediate_size": 2048}
    )
    LanguageModel.from_config(config).save_pretrained(tmp_path, max_shard_bytes=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in run.stdout.splitlines():
        peak, size = json.loads(line)
        assert peak <= size + shard + 4_000_000, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB"
