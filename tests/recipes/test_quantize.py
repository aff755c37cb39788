"""`nemotron3 quantize`: a directory to a directory, with what it costs."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron3.cli.main import main
from nemotron3.inference.llm import LLM
from nemotron3.inference.requests import SamplingParams
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import weight_format
from nemotron3.models.precision import convert_weights
from nemotron3.text import Tokenizer
from tests.small_run import StopAt, StoppedError
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
    scales = {name for name in tensors if name.endswith((".k_scale", ".v_scale"))}
    if wanted == "int8":
        assert not inputs | scales
        assert "fp8_keys" in summary
        assert summary["fp8_keys"] is None
    else:
        assert "backbone.layers.1.mixer.experts.5.down_proj.input_scale" in inputs
        described = json.loads((tmp_path / "it" / "hf_quant_config.json").read_text())
        algorithm = {"nvfp4": "NVFP4", "fp8": "FP8", "mixed": "MIXED_PRECISION"}[wanted]
        assert described["quantization"]["quant_algo"] == algorithm
        assert described["quantization"]["kv_cache_quant_algo"] == "FP8"
        scheme = json.loads((tmp_path / "it" / "config.json").read_text())["quantization_config"]
        assert scheme["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
        assert scales == {f"backbone.layers.2.mixer.{w}_proj.{w}_scale" for w in "kv"}
        assert all(tensors[name].shape == (1,) for name in scales)
        assert 0 < summary["fp8_keys"]["kl"] != found["kl"]
        assert summary["fp8_keys"]["kl"] == pytest.approx(found["kl"], rel=0.5)
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
        (("--format", "fp8", "--kv-cache", "fp8"), "--kv-cache needs text to find scales with"),
        (("--format", "int8", "--kv-cache", "fp8"), "--kv-cache is 'fp8', and int8 has no publ"),
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
    assert len(summary["frontier_of_experts"]) > len(summary["frontier"]) > 5
    assert "expected KL, experts apart" in capsys.readouterr().out
    for page in ("report.md", "report.html"):
        assert "Expected" in (tmp_path / "it" / "quantization" / page).read_text()
    assert quantize(folder, tmp_path / "none", "--format", "mixed", "--bits", "3", *data) == 2
    assert "--bits is 3, and the fewest bits" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_scales_of_keys_and_values_are_those_of_the_engine_or_left_out(folder, tmp_path):
    data = ("--data", str(folder.parent / "text.txt"), "--num-tokens", "1024")
    for name, options in (("with", ()), ("without", ("--kv-cache", "none"))):
        assert quantize(folder, tmp_path / name, "--format", "fp8", *data, *options) == 0
    narrow = StatePrecision(keys="float8")
    model = LanguageModel.from_pretrained(tmp_path / "with")
    stored = load_file(tmp_path / "with" / "model.safetensors")
    pair = tuple(stored[f"backbone.layers.2.mixer.{w}_proj.{w}_scale"].item() for w in ("k", "v"))
    # The MTP block's layer comes last, and no text is read with it.
    assert model.state_precision(narrow).key_scales == (pair, (1.0, 1.0))
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (again[name], tensor))), name
    for file in ("config.json", "hf_quant_config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "with" / file).read_bytes()
    described = json.loads((tmp_path / "without" / "hf_quant_config.json").read_text())
    assert described["quantization"]["kv_cache_quant_algo"] is None
    other = LanguageModel.from_pretrained(tmp_path / "without")
    assert other.state_precision(narrow).key_scales == ()
    assert summary_of(tmp_path / "without")["fp8_keys"] is None


DISTILLATION = (
    "--format", "nvfp4", "--scales", "max", "--training.optimizer.lr", "3e-4",
    "--num-tokens", "1024", "--distill", "6",
    "--training.batch-size", "2", "--training.microbatch-size", "1", "--training.seq-len", "64",
    "--training.checkpoint-every-steps", "2", "--training.evaluate-every-steps", "3",
)  # fmt: skip


def distill(folder, out, *options):
    text = folder.parent / "text.txt"
    return quantize(folder, out, "--data", str(text), *DISTILLATION, *options)


@pytest.fixture(scope="module")
def distilled(folder):
    out = folder.parent / "distilled"
    assert distill(folder, out) == 0
    return out


def summary_of(out):
    return json.loads((out / "quantization" / "summary.json").read_text())


def test_distillation_brings_it_nearer_to_the_original(folder, distilled, capsys):
    summary = summary_of(distilled)
    trained, after = summary["distillation"], summary["comparison"]
    assert after["kl"] < 0.9 * trained["before"]["kl"]
    assert [step for step, _ in trained["divergences"]] == [3, 6]
    assert trained["divergences"][-1][1] == pytest.approx(after["kl"])
    assert f"{trained['before']['kl']:.5f}" in (distilled / "quantization/report.md").read_text()
    assert not (distilled / "quantization" / "checkpoints").exists()
    assert weight_format(LanguageModel.from_pretrained(distilled)) == "nvfp4"
    mtp = [name for name in load_file(folder / "model.safetensors") if name.startswith("mtp.")]
    before, now = (load_file(path / "model.safetensors") for path in (folder, distilled))
    assert mtp
    assert all(torch.equal(before[name], now[name]) for name in mtp)
    biases = [name for name in now if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(before[name], now[name]) for name in biases)
    assert distill(folder, distilled) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_distillation_goes_on(folder, distilled, tmp_path, monkeypatch, capsys):
    out = tmp_path / "it"
    with monkeypatch.context() as patch:
        patch.setattr("nemotron3.cli.quantize.watch", lambda: nullcontext(StopAt(5)))
        with pytest.raises(StoppedError):
            distill(folder, out)
    assert not (out / "config.json").exists()
    assert distill(folder, out, "--training.seq-len", "32") == 2
    assert "holds a run with other settings" in capsys.readouterr().err
    assert quantize(folder, out, "--format", "nvfp4") == 2
    assert "where a distillation was begun" in capsys.readouterr().err
    assert distill(folder, out) == 0
    printed = capsys.readouterr().out
    assert "Memory, at most about" in printed
    assert "6 updates on 768 tokens" in printed
    for file in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (out / file).read_bytes() == (distilled / file).read_bytes()
    found, expected = summary_of(out), summary_of(distilled)
    assert found["distillation"] == expected["distillation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--distill", "0"), "--distill is 0; it must be 1 or more updates"),
        (("--distill",), "--distill needs text to train on"),
        (("--distill", "--training.bias-update-rate", "0.1"), "bias_update_rate is 0.1; exp"),
        (("--distill", "--training.precision.recipe", "nvfp4"), "recipe is 'nvfp4'"),
    ],
)
def test_mistakes_of_a_distillation_are_named(folder, tmp_path, capsys, options, message):
    assert quantize(folder, tmp_path / "it", "--format", "fp8", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "it").exists()
