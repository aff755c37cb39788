"""Models whose matrices are kept in a number format: as good as its rounding, saved and read."""

import json
from dataclasses import replace

import pytest
import torch

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.inference.model_runner import ModelRunner
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import (
    quantizable_names,
    state_tensors,
    weight_format,
    weight_formats,
)
from nemotron3.models.precision import convert_weights
from nemotron3.ops.weights import FORMATS, QuantizedWeight
from tests.tiny import WHOLE_BLOCKS, qwen_config, tiny_config, tiny_model, tokens_for
from tests.tolerances import BFLOAT16, DECODE, FLOAT32

MODELS = {
    "whole": tiny_config("MEM*E-ME/*E/*E", **WHOLE_BLOCKS),
    "wide experts": tiny_config("ME*E", moe={"moe_latent_size": None, **WHOLE_BLOCKS["moe"]}),
    "transformer": qwen_config(moe={"moe_intermediate_size": 112}),
    "tied": tiny_config("M*-", tie_word_embeddings=True, **WHOLE_BLOCKS),
}
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
every_format = pytest.mark.parametrize("weights", FORMATS)


@every_format
@every_model
@torch.no_grad()
def test_is_the_dequantized_model(config, weights, assert_close):
    plain = tiny_model(config)
    model = convert_weights(plain, weights)
    tokens = tokens_for(config, 2, 37)
    logits = model(tokens)
    assert_close(logits, convert_weights(model, None)(tokens), FLOAT32)
    # Rounding is seen, and no more: where it changes which experts a token goes to, random weights
    # make a difference of a tenth.
    off = (logits - plain(tokens)).square().mean().sqrt() / plain(tokens).std()
    assert 1e-4 < off < {"int8": 0.2, "fp8": 0.3, "nvfp4": 0.9}[weights]


@every_format
def test_keeps_what_is_not_a_matrix_of_products(weights):
    model = convert_weights(tiny_model(MODELS["whole"]), weights)
    kinds = {name: isinstance(t, QuantizedWeight) for name, t in state_tensors(model)}
    ends = ("in_proj.weight", "out_proj.weight", "up_proj", "down_proj", "lm_head.weight")
    assert all(kinds[name] for name in kinds if name.endswith(ends))
    stay = ("gate.weight", "embeddings.weight", "A_log", "conv1d.weight", "D", "dt_bias", "bias")
    assert not any(kinds[name] for name in kinds if name.endswith(stay) or "norm" in name)
    assert weight_format(model) == weights
    assert model.compute_dtype == torch.float32


@every_format
@every_model
@torch.no_grad()
def test_steps_are_the_forward_pass(config, weights, assert_close):
    """One sequence read token by token: the first step, and its replays, against the whole."""
    model = convert_weights(tiny_model(config), weights)
    tokens = tokens_for(config, 3, 21)
    cache = model.new_state(3)
    steps = ModelRunner(model, cache)
    replayed = [
        steps.decode(part.tolist(), [0, 1, 2]).logits.clone() for part in tokens.split(1, 1)
    ]
    assert_close(torch.cat(replayed, 1), model(tokens), DECODE)
    state = model.new_state(3)
    for part, step in zip(tokens.split(1, 1), replayed, strict=True):
        layout = state.layout([1] * 3)
        logits = model.logits(model.hidden_states(part.flatten(), layout=layout, state=state))
        assert torch.equal(logits, step[:, 0])


@every_format
@every_model
def test_is_saved_and_read_to_the_bit(tmp_path, config, weights):
    model = convert_weights(tiny_model(config), weights)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    described = fields["quantization_config"]
    if weights == "int8":
        assert fields["model_type"] == "nemotron3"
        assert described["format"] == weights
        assert not (tmp_path / "hf_quant_config.json").exists()
    else:
        algorithm = {"fp8": "FP8", "nvfp4": "W4A16_NVFP4"}[weights]
        assert described["quant_method"] == "modelopt"
        other = json.loads((tmp_path / "hf_quant_config.json").read_text())["quantization"]
        assert described["quant_algo"] == other["quant_algo"] == algorithm
    read = LanguageModel.from_pretrained(tmp_path)
    spread = {"initializer_range": config.init_std}  # written as a number
    assert replace(read.config, **spread) == replace(config, **spread)
    assert_same(read, model)
    read.save_pretrained(tmp_path / "again")
    assert_same(LanguageModel.from_pretrained(tmp_path / "again", weights=weights), model)


@every_format
@every_model
def test_plain_files_are_quantized_as_they_are_read(tmp_path, config, weights):
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    read = LanguageModel.from_pretrained(tmp_path, weights=weights)
    assert_same(read, convert_weights(model, weights))


@every_format
@every_model
def test_a_converted_model_goes_back_to_its_layout(tmp_path, config, weights):
    tiny_model(config).save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    model = LanguageModel.from_pretrained(tmp_path, weights=weights)
    convert_weights(model, None).save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "config.json").read_text()) == before
    read = LanguageModel.from_pretrained(tmp_path / "plain")
    assert weight_format(read) is None
    assert_same(read, convert_weights(model, None))


@every_format
@pytest.mark.parametrize("name", ["whole", "tied"])
def test_activations_may_be_bfloat16(tmp_path, weights, name, assert_close):
    config = MODELS[name]
    tiny_model(config).save_pretrained(tmp_path)
    model = LanguageModel.from_pretrained(tmp_path, weights=weights, dtype=torch.bfloat16)
    assert model.compute_dtype == torch.bfloat16
    if name == "tied":  # without routers, which a rounding makes choose another expert
        exact = LanguageModel.from_pretrained(tmp_path, weights=weights)
        tokens = tokens_for(config, 2, 9)
        with torch.no_grad():
            assert_close(model(tokens).float(), exact(tokens), BFLOAT16)
    model.save_pretrained(tmp_path / "narrow")
    read = LanguageModel.from_pretrained(tmp_path / "narrow")
    assert read.compute_dtype == torch.bfloat16
    assert_same(read, model)


@every_format
def test_gradients_pass_through(weights, assert_close):
    """What is not quantized is trained beside the frozen matrices, as if these were plain."""
    config = MODELS["whole"]
    model = convert_weights(tiny_model(config), weights)
    plain = convert_weights(model, None)
    tokens = tokens_for(config, 2, 15)
    for each in (model, plain):
        each(tokens).logsumexp(-1).sum().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, gradients[name].grad, 1e-4)
    assert model.backbone.embeddings.weight.grad.any()


@every_format
def test_what_does_not_fit_is_refused(tmp_path, weights):
    config = MODELS["wide experts"]
    model = tiny_model(config)
    with pytest.raises(
        ConfigError, match="weights is 'int3'; the number formats are int8, fp8, nvfp4"
    ):
        convert_weights(model, "int3")
    convert_weights(model, weights).save_pretrained(tmp_path / "held")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"'lm_head.weight'.* not finite"):
        LanguageModel.from_pretrained(tmp_path / "broken", weights=weights)


def assert_same(a: LanguageModel, b: LanguageModel) -> None:
    tensors, others = a.state_dict(), b.state_dict()
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype
        bits = (t if t.dtype.itemsize > 1 else t.view(torch.uint8) for t in (tensor, others[name]))
        assert torch.equal(*bits), name


def test_a_format_of_our_own_that_is_unknown_is_named(tmp_path):
    convert_weights(tiny_model("E"), "int8").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["quantization_config"]["format"] = "int3"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="weights is 'int3'"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_matrix_without_whole_blocks_is_named():
    with pytest.raises(ConfigError, match=r"'backbone.layers.0.mixer.experts.down_proj' .* 24 inp"):
        convert_weights(tiny_model("E"), "nvfp4")


def test_some_matrices_may_have_formats_of_their_own(tmp_path, assert_close):
    """The published mix: experts in four bits, Mamba and shared experts in eight."""
    config = MODELS["whole"]
    plain = tiny_model(config)
    plain.save_pretrained(tmp_path / "plain")
    formats = {}
    for name in quantizable_names(plain):
        if ".experts." in name:
            formats[name] = "nvfp4"
        elif "_proj" in name and ("shared" in name or "in_proj" in name or "out_proj" in name):
            formats[name] = "fp8"
    model = LanguageModel.from_pretrained(tmp_path / "plain", weights=formats)
    assert weight_formats(model) == formats
    assert weight_format(model) == "mixed"
    tokens = tokens_for(config, 2, 11)
    with torch.no_grad():
        assert_close(model(tokens), convert_weights(model, None)(tokens), FLOAT32)
    model.save_pretrained(tmp_path / "mixed")
    described = json.loads((tmp_path / "mixed" / "hf_quant_config.json").read_text())
    layers = described["quantization"]["quantized_layers"]
    assert layers["backbone.layers.1.mixer.experts.3.up_proj"]["quant_algo"] == "W4A16_NVFP4"
    assert layers["backbone.layers.0.mixer.in_proj"] == {"quant_algo": "FP8"}
    assert "lm_head" in described["quantization"]["exclude_modules"]
    read = LanguageModel.from_pretrained(tmp_path / "mixed")
    assert weight_formats(read) == formats
    assert_same(read, model)
    with pytest.raises(ConfigError, match=r"weights is 'fp8'.* holds mixed weights"):
        LanguageModel.from_pretrained(tmp_path / "mixed", weights="fp8")
    with pytest.raises(ConfigError, match=r"'backbone.norm_f.weight' is no matrix"):
        LanguageModel.from_pretrained(tmp_path / "plain", weights={"backbone.norm_f.weight": "fp8"})
