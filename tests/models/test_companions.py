"""Loading a model and saving it again changes nothing that its directory says."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron3.checkpoint.safetensors import ShardedReader
from nemotron3.errors import CheckpointError
from nemotron3.models.huggingface import nemotron_h, read_config
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer
from tests.models.test_huggingface_directory import (
    LISTS,
    NATIVE,
    change_config,
    without_selection_biases,
)
from tests.tiny import qwen_config, tiny_config, tiny_model

UNKNOWN = {
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "expand": 2,
    "mamba_ssm_cache_dtype": "float32",
    "my_note": {"nested": [1, None, "x"]},
    "null_field": None,
    "transformers_version": "4.55.4",
    "use_cache": False,
}
GENERATION = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2, 11],
    "pad_token_id": 0,
    "temperature": 1.0,
    "top_p": 0.95,
    "my_note": "kept",
}
HYBRID = tiny_config("MEM*E-/*E/*E")
DIALECTS = {
    "as we write it": (HYBRID, {}),
    "published, with a pattern": (
        HYBRID,
        {"layers_block_type": ..., "mtp_layers_block_type": ..., "dtype": ..., "norm_eps": 1e-5},
    ),
    "published, with lists": (
        tiny_config("MEM*E/*E"),
        {
            "hybrid_override_pattern": ...,
            "layers_block_type": LISTS["mamba"],
            "mtp_hybrid_override_pattern": ...,
            "num_mtp_depths": ...,
            "num_hidden_layers": ...,
            "time_step_limit": [0.0, {"__float__": "Infinity"}],
        },
    ),
    "saved by transformers": (
        tiny_config("MEM*E"),
        {
            "hybrid_override_pattern": ...,
            "layers_block_type": ...,
            "layer_types": LISTS["linear"],
            "mtp_layers_block_type": ["full_attention", "moe"],
            "torch_dtype": ...,
            "time_step_limit": ...,
        },
    ),
    "by older names": (
        HYBRID,
        {
            "n_groups": ...,
            "mamba_n_groups": 2,
            "conv_kernel": ...,
            "mamba_d_conv": 4,
            "layer_norm_epsilon": ...,
            "rms_norm_eps": 1e-5,
            "n_routed_experts": ...,
            "num_local_experts": 8,
            "eos_token_id": [2, 11],
            "pad_token_id": None,
            "dtype": ...,
            "torch_dtype": ...,
        },
    ),
    "transformer": (qwen_config(), {"num_experts": ..., "num_local_experts": 8}),
    "transformer of transformers 5": (
        qwen_config(),
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
    ),
    "tied transformer": (qwen_config(tie_word_embeddings=True), {"bos_token_id": None}),
    **{f"ours, {name}": (config, {}) for name, config in NATIVE.items()},
}


def published(folder: Path, config=HYBRID, changes=None) -> Path:
    """A directory with everything that a published one has."""
    model = tiny_model(config)
    if config.moe and config.moe.scoring == "softmax":
        without_selection_biases(model)
    model.save_pretrained(folder)
    change_config(folder, **UNKNOWN | (changes or {}))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    tokenizer = Tokenizer.train(["one two three, one two three"] * 3, vocab_size=300)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save(folder)
    (folder / "added_tokens.json").write_text('{"<extra>": 299}')
    (folder / "configuration_nemotron_h.py").write_text("# read by transformers\n")
    return folder


def contents(folder: Path) -> dict[str, object]:
    """Every file: JSON as what it says, other files as their bytes, tensors left out."""
    return {
        file.name: json.loads(file.read_text()) if file.suffix == ".json" else file.read_bytes()
        for file in folder.iterdir()
        if ".safetensors" not in file.name
    }


@pytest.mark.parametrize(("config", "changes"), DIALECTS.values(), ids=DIALECTS)
def test_every_field_and_file_comes_back(tmp_path, config, changes):
    source = published(tmp_path / "source", config, changes)
    before = contents(source)
    copied = tmp_path / "copy"
    LanguageModel.from_pretrained(source).save_pretrained(copied)
    after = contents(copied)
    assert after.keys() == before.keys()
    for name, content in before.items():
        if isinstance(content, dict):
            assert isinstance(after[name], dict)
            assert after[name].keys() == content.keys(), name
            for field, value in content.items():
                assert after[name][field] == value, f"{name}: {field}"
        assert after[name] == content, name
    assert read_config(copied) == read_config(source)
    # Once more, and over itself: what was written is as complete as what was read.
    LanguageModel.from_pretrained(copied).save_pretrained(copied)
    assert contents(copied) == before


def test_a_copy_of_a_loaded_model_carries_the_same(tmp_path):
    source = published(tmp_path / "source")
    copy.deepcopy(LanguageModel.from_pretrained(source)).save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(source)


def test_a_directory_that_is_gone_is_still_carried(tmp_path):
    source = published(tmp_path / "source")
    before, model = contents(source), LanguageModel.from_pretrained(source)
    source.rename(tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy") == before


def test_what_changed_is_written_and_its_other_names_go(tmp_path):
    older = {"layer_norm_epsilon": ..., "norm_eps": 1e-5, "rms_norm_eps": 1e-5}
    source = published(tmp_path / "source", changes=older | {"layer_types": None})
    model = LanguageModel.from_pretrained(source)
    model.config = replace(model.config, layer_norm_epsilon=1e-4, eos_token_id=(2, 11))
    model.save_pretrained(tmp_path / "copy")
    before, after = contents(source), contents(tmp_path / "copy")
    expected = dict(before["config.json"]) | {"layer_norm_epsilon": 1e-4, "eos_token_id": [2, 11]}
    assert after["config.json"] == {
        name: value for name, value in expected.items() if name not in ("norm_eps", "rms_norm_eps")
    }
    assert after["generation_config.json"] == before["generation_config.json"]
    assert read_config(tmp_path / "copy") == model.config
    model.config = replace(model.config, eos_token_id=11, pad_token_id=5)
    model.save_pretrained(tmp_path / "again")
    tokens = {"eos_token_id": 11, "pad_token_id": 5}
    assert contents(tmp_path / "again")["generation_config.json"] == GENERATION | tokens
    assert read_config(tmp_path / "again") == model.config


def test_other_layers_replace_every_spelling_of_the_old(tmp_path):
    source = published(tmp_path / "source", changes={"layer_types": [*LISTS["linear"], "mlp"]})
    longer = tiny_model("MEM*E-M/*E/*E/*E")
    longer.companions = LanguageModel.from_pretrained(source).companions
    longer.save_pretrained(tmp_path / "copy")
    fields = contents(tmp_path / "copy")["config.json"]
    assert "layer_types" not in fields
    assert fields["my_note"] == UNKNOWN["my_note"]
    assert read_config(tmp_path / "copy").hybrid_override_pattern == "MEM*E-M/*E/*E/*E"
    without = tiny_model("MEM*E-")
    without.companions = longer.companions
    without.save_pretrained(tmp_path / "without")
    assert "num_mtp_depths" not in contents(tmp_path / "without")["config.json"]
    assert read_config(tmp_path / "without").hybrid_override_pattern == "MEM*E-"


def test_a_model_that_its_layout_cannot_hold_takes_the_unknown_fields_along(tmp_path):
    source = published(tmp_path / "source", qwen_config())
    model = LanguageModel.from_pretrained(source)
    model.routers[0].e_score_correction_bias.fill_(0.5)
    model.save_pretrained(tmp_path / "copy")
    after = contents(tmp_path / "copy")
    fields = after["config.json"]
    assert fields["model_type"] == "nemotron3"
    assert fields.keys() == (UNKNOWN.keys() - {"auto_map"}) | {
        "model_type",
        "model",
        "dtype",
        "torch_dtype",
    }
    assert after["generation_config.json"] == GENERATION
    read = LanguageModel.from_pretrained(tmp_path / "copy")
    assert (read.routers[0].e_score_correction_bias == 0.5).all()


def test_no_shared_expert_in_the_published_layout_stays_there(tmp_path):
    config = tiny_config("ME", moe={"moe_shared_expert_intermediate_size": 0})
    tiny_model(config).save_pretrained(tmp_path)
    fields = nemotron_fields(config) | {"n_shared_experts": 0}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    LanguageModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy")["config.json"] == fields


def nemotron_fields(config) -> dict[str, object]:
    return json.loads(json.dumps(nemotron_h.config_to(config)))


def test_the_dtype_is_that_of_the_weights(tmp_path):
    source = published(tmp_path / "source")
    model = LanguageModel.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "copy")
    fields = contents(tmp_path / "copy")["config.json"]
    assert fields == dict(contents(source)["config.json"]) | {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    # A router in float32, as some published files have it, does not widen the rest.
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    name = "backbone.layers.1.mixer.gate.weight"
    save_file(tensors | {name: tensors[name].float()}, file)
    assert ShardedReader(tmp_path / "copy").info(name).dtype == torch.float32
    read = LanguageModel.from_pretrained(tmp_path / "copy")
    assert read.output_weight.dtype == torch.bfloat16


def test_a_tokenizer_that_was_saved_first_stays(tmp_path):
    model = LanguageModel.from_pretrained(published(tmp_path / "source"))
    other = Tokenizer.train(["quite another text, quite another text"] * 3, vocab_size=310)
    other.save(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")
    assert Tokenizer.from_directory(tmp_path / "copy").fingerprint == other.fingerprint
    assert not (tmp_path / "copy" / "chat_template.jinja").exists()


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "no JSON object")])
def test_defaults_that_cannot_be_read_are_named_before_any_weight_moves(tmp_path, content, message):
    source = published(tmp_path / "source")
    (source / "generation_config.json").write_text(content)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"generation_config\.json .*{message}"):
        LanguageModel.from_pretrained(source)


def test_a_language_model_inside_a_larger_one_is_saved_alone(tmp_path):
    source = published(tmp_path / "source")
    inner = contents(source)["config.json"]
    (source / "config.json").write_text(
        json.dumps({"model_type": "NemotronH_Omni", "vision_config": {}, "llm_config": inner})
    )
    LanguageModel.from_pretrained(source).save_pretrained(tmp_path / "copy")
    assert contents(tmp_path / "copy")["config.json"] == inner
