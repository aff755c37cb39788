"""The checkpoint of random weights, and the benchmark of the published size, at a small size."""

import json
import math
import sys
import weakref
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from benchmarks.nano_cpu import nano_table
from benchmarks.random_checkpoint import (
    num_bytes,
    planned_model,
    random_weights,
    write_checkpoint,
)

from benchmarks import nano_cpu, random_checkpoint, random_gguf
from nemotron3.checkpoint import ShardedReader, files
from nemotron3.errors import StorageError
from nemotron3.export.gguf import model_fields
from nemotron3.export.gguf_tensors import gguf_tensors
from nemotron3.models.huggingface import published_views
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import weight_formats
from nemotron3.ops.weights import dequantized
from tests.tiny import tokens_for

CONFIG = nano_cpu.sizes()["tiny"]


def test_a_checkpoint_is_the_published_mix(tmp_path):
    """Formats, dtypes and bytes are those of the plan, and a model reads it and computes."""
    write_checkpoint(CONFIG, tmp_path, max_shard_bytes=200_000)
    reader = ShardedReader(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 5
    assert reader.total_bytes == num_bytes(planned_model(CONFIG))
    experts = "backbone.layers.1.mixer.experts.3.up_proj."
    kinds = {
        "backbone.embeddings.weight": torch.bfloat16,
        "backbone.layers.0.norm.weight": torch.bfloat16,
        "backbone.layers.0.mixer.A_log": torch.float32,
        "backbone.layers.1.mixer.gate.weight": torch.float32,
        "backbone.layers.0.mixer.in_proj.weight": torch.float8_e4m3fn,
        "mtp.layers.1.mixer.experts.3.up_proj.weight": torch.bfloat16,
        f"{experts}weight": torch.uint8,
        f"{experts}weight_scale": torch.float8_e4m3fn,
        f"{experts}weight_scale_2": torch.float32,
    }
    for name, dtype in kinds.items():
        assert reader.info(name).dtype == dtype, name
    model = LanguageModel.from_pretrained(tmp_path, mapped=True)
    assert weight_formats(model) == weight_formats(planned_model(CONFIG))
    with torch.no_grad():
        logits = model(tokens_for(CONFIG, 2, 9))
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_weights_are_drawn_one_at_a_time_with_the_size_of_new_ones():
    model = planned_model(CONFIG)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    views = dict(published_views(model, CONFIG))
    before = None
    for name, weight in random_weights(model, seed=1):
        assert before is None or before() is None
        assert views.pop(name).shape == weight.shape
        if ".experts." in name or "embeddings" in name:
            spread = dequantized(weight).float().std()
            assert math.isclose(spread, CONFIG.init_std, rel_tol=0.1), name
        before = weakref.ref(weight)
        del weight
    assert not views


def test_the_benchmark_writes_measures_and_reuses_its_files(tmp_path, capsys, monkeypatch):
    # Not in processes of their own, whose start takes longer than all else.
    monkeypatch.setattr(nano_cpu, "measure_apart", nano_cpu.measure)
    folder, out = tmp_path / "models", tmp_path / "out"
    words = ["--size", "tiny", "--folder", str(folder), "--prompt", "20", "--tokens", "8"]
    words += ["--repeats", "2", "--llama-cpp", str(fake_llama_bench(tmp_path)), "--out", str(out)]
    nano_cpu.main(words)
    assert capsys.readouterr().out.count("writing 0.0") == 2
    (file,) = out.iterdir()
    result = json.loads(file.read_text())
    shards = folder.joinpath("tiny").glob("*.safetensors")
    assert result["checkpoint_bytes"] == sum(f.stat().st_size for f in shards)
    assert [run["drafts"] for run in result["runs"]] == [0, 3]
    for run in result["runs"]:
        assert bool(run["drafted_tokens"]) == bool(run["drafts"])
        for name in ("prompt_tokens_per_s", "decode_tokens_per_s"):
            rates = run[name]
            assert 0 < rates["min"] <= rates["median"] <= rates["max"]
        assert run["resident_bytes"]["peak"] >= run["resident_bytes"]["files"] > 0
    other = result["llama_cpp"]
    assert other["file_bytes"] == (folder / "tiny-q4_0.gguf").stat().st_size
    assert other["prompt_tokens_per_s"] == {"median": 10.0, "min": 8.0, "max": 13.33}
    assert other["decode_tokens_per_s"] == {"median": 4.0, "min": 3.2, "max": 5.33}
    assert other["resident_bytes"]["peak"] > 0
    assert "against llama.cpp" in nano_table(result)[0]
    nano_cpu.main(words)
    assert "writing" not in capsys.readouterr().out
    (folder / "tiny").rename(folder / "toy")
    with pytest.raises(SystemExit, match="holds another model"):
        nano_cpu.main(["--size", "toy", "--folder", str(folder), "--out", str(out)])
    with pytest.raises(SystemExit):
        nano_cpu.main(["--llama-cpp", str(tmp_path / "none"), "--folder", str(folder)])
    assert "none, which does not exist" in capsys.readouterr().err


def fake_llama_bench(folder):
    """A program that takes llama-bench's options and has measured something."""
    program = folder / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "options = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert [options[name] for name in ('-p', '-n', '-r')] == ['20', '8', '2']\n"
        "assert options['-m'].endswith('tiny-q4_0.gguf')\n"
        "samples = {'samples_ns': [2e9, 1.5e9, 2.5e9]}\n"
        "print(json.dumps([{'n_prompt': 20, 'n_gen': 0, **samples},\n"
        "                  {'n_prompt': 0, 'n_gen': 8, **samples}]))\n"
    )
    program.chmod(0o755)
    return program


def test_the_files_are_checked_against_the_disk_before_the_first(tmp_path, monkeypatch):
    both = num_bytes(planned_model(CONFIG)) + random_gguf.num_bytes(CONFIG)
    usage = files.shutil._ntuple_diskusage(10**9, 0, both - 1)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="free and this save needs"):
        nano_cpu.prepare(CONFIG, tmp_path / "tiny", tmp_path / "tiny.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_process_of_its_own_prints_a_measurement(tmp_path):
    write_checkpoint(nano_cpu.sizes()["toy"], tmp_path)
    found = nano_cpu.measure_apart(tmp_path, drafts=0, prompt=9, tokens=4, repeats=1)
    assert found["drafted_tokens"] == 0 < found["ready_s"]


def test_llama_cpps_file_has_the_types_of_its_own_program(tmp_path):
    """As llama-quantize chose them (`python -m benchmarks.random_gguf --quantize`)."""
    config = nano_cpu.sizes()["150m-latent"]
    chosen = {t.name: random_gguf.q4_0_type(t, config) for t in gguf_tensors(config)}
    assert chosen["output.weight"] == "q6_k"
    assert chosen["token_embd.weight"] == chosen["blk.1.ffn_down_exps.weight"] == "q4_0"
    assert chosen["blk.0.ssm_conv1d.weight"] == chosen["blk.1.ffn_gate_inp.weight"] == "f32"
    nano = nano_cpu.sizes()["nano"]
    output = next(t for t in gguf_tensors(nano) if t.name == "output.weight")
    assert random_gguf.q4_0_type(output, nano) == "q8_0"
    tied = replace(CONFIG, tie_word_embeddings=True)
    embedding = next(gguf_tensors(tied))
    assert random_gguf.q4_0_type(embedding, tied) in ("q6_k", "q8_0")


def test_llama_cpps_file_is_of_the_architecture_and_has_the_size_of_new_weights(tmp_path):
    config = nano_cpu.sizes()["30m-latent"]
    random_gguf.write_random_gguf(config, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for name, value in model_fields(config).items():
        assert fields[name] == (pytest.approx(value) if isinstance(value, float) else value)
    assert sum(t.n_bytes for t in reader.tensors) == random_gguf.num_bytes(config)
    shapes = {t.name: tuple(map(int, reversed(t.shape))) for t in reader.tensors}
    assert shapes == {t.name: t.shape for t in gguf_tensors(config)}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all()
        if tensor.tensor_type.name != "F32":
            assert math.isclose(values.std(), config.init_std, rel_tol=0.1), tensor.name


def test_a_full_disk_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    usage = files.shutil._ntuple_diskusage(10**6, 0, 10**6)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    drawn = []
    monkeypatch.setattr(random_checkpoint, "plain_values", lambda *given: drawn.append(given))
    with pytest.raises(StorageError, match=r"1\.0 MB free and this save needs \d\.\d MB"):
        write_checkpoint(CONFIG, tmp_path)
    assert not drawn
    assert not list(tmp_path.iterdir())
