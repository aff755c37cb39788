"""`nemotron3 quantize`: a directory to a directory, with what it costs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron3.cli.main import main
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import weight_format
from nemotron3.models.precision import convert_weights
from nemotron3.text import Tokenizer
from tests.tiny import WHOLE_BLOCKS, tiny_config, tiny_model, tokens_for

CONFIG = tiny_config("ME*E/*E", vocab_size=300, **WHOLE_BLOCKS)
TEXT = "the quick brown fox jumps over the lazy dog while a cat looks on and says nothing. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    folder.mkdir()
    Tokenizer.train([TEXT * 9], vocab_size=300, num_special_tokens=32).save(folder)
    tiny_model(CONFIG).save_pretrained(folder)
    (folder.parent / "text.txt").write_text(TEXT * 300)
    return folder


def quantize(folder, out, *options):
    return main(["quantize", str(folder), "--out", str(out), "--device", "cpu", *options])


@pytest.mark.parametrize("wanted", ["nvfp4", "fp8", "int8", "mixed"])
def test_a_directory_that_is_read_as_any(folder, tmp_path, capsys, wanted):
    data = ("--data", str(folder.parent / "text.txt"), "--num-tokens", "2048")
    assert quantize(folder, tmp_path / "it", "--format", wanted, *data) == 0
    summary = json.loads((tmp_path / "it" / "quantization" / "summary.json").read_text())
    assert f"{summary['bits_per_element']:.2f} bits per element" in capsys.readouterr().out
    found = summary["comparison"]
    assert found["num_tokens"] > 500
    assert 0 < found["kl"] < 1
    rounded = summary["rounded_activations"]
    assert (rounded is None) == (wanted == "fp8")
    assert rounded is None or rounded["num_tokens"] == found["num_tokens"]
    assert rounded is None or 0 < abs(rounded["kl"] - found["kl"]) < 0.1
    assert summary["bits_per_element"] < summary["original_bits_per_element"] == 32
    pages = tmp_path / "it" / "quantization"
    for page in ("report.md", "report.html"):
        text = (pages / page).read_text()
        assert "backbone.layers.1.mixer.experts.down_proj" in text
        assert f"{found['loss']:.4f}" in text
    tensors = load_file(tmp_path / "it" / "model.safetensors")
    inputs = {name for name in tensors if name.endswith("input_scale")}
    if wanted == "int8":
        assert not inputs
    else:
        assert "backbone.layers.1.mixer.experts.5.down_proj.input_scale" in inputs
        described = json.loads((tmp_path / "it" / "hf_quant_config.json").read_text())
        algorithm = {"nvfp4": "NVFP4", "fp8": "FP8", "mixed": "MIXED_PRECISION"}[wanted]
        assert described["quantization"]["quant_algo"] == algorithm
    model = LanguageModel.from_pretrained(tmp_path / "it")
    assert weight_format(model) == wanted
    plain = convert_weights(model, None)
    prompt = tokens_for(CONFIG, 9).tolist()
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0, ignore_eos=True)
    [answer] = LLM(tmp_path / "it", device="cpu").generate([prompt], params)
    ids = list(answer.outputs[0].token_ids)
    with torch.no_grad():
        logprobs = plain(torch.tensor([prompt + ids]))[0].log_softmax(-1)
    expected = torch.stack([logprobs[8 + i, token] for i, token in enumerate(ids)])
    entries = answer.outputs[0].logprobs
    actual = torch.tensor([entry.logprob for entry in entries])
    assert torch.allclose(actual, expected, atol=1e-5)


def test_without_text_nothing_is_said_of_the_loss(folder, tmp_path, capsys):
    assert quantize(folder, tmp_path / "it", "--format", "nvfp4", "--scales", "four_over_six") == 0
    assert "no text was at hand" in capsys.readouterr().out
    summary = json.loads((tmp_path / "it" / "quantization" / "summary.json").read_text())
    assert summary["comparison"] is None
    assert summary["scales"] == "four_over_six"
    described = json.loads((tmp_path / "it" / "hf_quant_config.json").read_text())
    assert described["quantization"]["quant_algo"] == "W4A16_NVFP4"


@pytest.mark.parametrize("wanted", ["nvfp4", "fp8", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_text_no_model_is_in_memory(folder, tmp_path, monkeypatch, wanted, dtype):
    """Matrix by matrix: the same files and the same report as of a model in memory."""
    source = tmp_path / "source"
    LanguageModel.from_pretrained(folder, dtype=dtype).save_pretrained(source)
    whole, by_matrix = tmp_path / "whole", tmp_path / "by-matrix"
    with monkeypatch.context() as patch:
        patch.setattr("nemotron3.recipes.quantize.can_quantize_by_matrix", lambda *_: False)
        assert quantize(source, whole, "--format", wanted) == 0
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "from_pretrained", lambda *_, **__: 1 / 0)
        assert quantize(source, by_matrix, "--format", wanted) == 0
    files = {p.relative_to(whole) for p in whole.rglob("*") if p.is_file()}
    assert files == {p.relative_to(by_matrix) for p in by_matrix.rglob("*") if p.is_file()}
    for file in files:
        if file.parent.name != "quantization":
            assert (whole / file).read_bytes() == (by_matrix / file).read_bytes(), file
    summaries = [
        json.loads((out / "quantization" / "summary.json").read_text())
        for out in (whole, by_matrix)
    ]
    assert summaries[0] == summaries[1]


def test_values_that_are_not_finite_are_named_and_leave_nothing(folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    tensors = load_file(source / "model.safetensors")
    name = "backbone.layers.1.mixer.experts.5.down_proj.weight"
    tensors[name] = tensors[name] * torch.inf
    save_file(tensors, source / "new")
    (source / "new").replace(source / "model.safetensors")
    assert quantize(source, tmp_path / "it", "--format", "nvfp4") == 2
    assert f"{name!r} cannot be quantized: nvfp4: a weight" in capsys.readouterr().err
    assert not list((tmp_path / "it").glob("*model*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "fp8", "--scales", "mse"), "--scales is 'mse', which is for blocks of NVFP4"),
        (("--format", "fp8", "--bits", "9"), "--bits is 9 with format 'fp8'"),
        (("--format", "mixed", "--bits", "9"), "--bits needs text to weigh matrices with"),
        (("--format", "fp8", "--num-tokens", "0"), "--num-tokens is 0; it must be 1 or more"),
        (("--format", "fp8", "--column", "body"), "--column goes with --data"),
        (("--format", "fp8", "--data", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(folder, tmp_path, capsys, options, message):
    assert quantize(folder, tmp_path / "it", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "it").exists()


def test_neither_a_full_folder_nor_a_quantized_model_is_taken(folder, tmp_path, capsys):
    assert quantize(folder, tmp_path / "it", "--format", "fp8") == 0
    assert quantize(folder, tmp_path / "it", "--format", "fp8") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert quantize(tmp_path / "it", tmp_path / "again", "--format", "nvfp4") == 2
    assert "holds fp8 weights already; give the plain model" in capsys.readouterr().err


def test_a_mix_is_searched_for_a_budget(folder, tmp_path, capsys):
    data = ("--data", str(folder.parent / "text.txt"), "--num-tokens", "2048")
    assert quantize(folder, tmp_path / "it", "--format", "mixed", "--bits", "20", *data) == 0
    summary = json.loads((tmp_path / "it" / "quantization" / "summary.json").read_text())
    assert 15 < summary["bits_per_element"] <= 20
    assert len(summary["frontier"]) > 5
    for page in ("report.md", "report.html"):
        assert "Expected" in (tmp_path / "it" / "quantization" / page).read_text()
    assert quantize(folder, tmp_path / "none", "--format", "mixed", "--bits", "3", *data) == 2
    assert "--bits is 3, and the fewest bits" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
