"""The checkpoint of random weights, and the benchmark of the published size, at a small size."""

import json
import math
import weakref

import pytest
import torch
from benchmarks.random_checkpoint import (
    num_bytes,
    planned_model,
    random_weights,
    write_checkpoint,
)

from benchmarks import nano_cpu, random_checkpoint
from nemotron3.checkpoint import ShardedReader, files
from nemotron3.errors import StorageError
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


def test_the_benchmark_writes_measures_and_reuses_its_checkpoint(tmp_path, capsys, monkeypatch):
    # Not in processes of their own, whose start takes longer than all else.
    monkeypatch.setattr(nano_cpu, "measure_apart", nano_cpu.measure)
    folder, out = tmp_path / "model", tmp_path / "out"
    words = ["--size", "tiny", "--folder", str(folder), "--prompt", "20", "--tokens", "8"]
    nano_cpu.main([*words, "--out", str(out)])
    assert "writing 0.0" in capsys.readouterr().out
    (file,) = out.iterdir()
    result = json.loads(file.read_text())
    assert result["checkpoint_bytes"] == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert [run["drafts"] for run in result["runs"]] == [0, 3]
    for run in result["runs"]:
        assert bool(run["drafted_tokens"]) == bool(run["drafts"])
        assert run["prompt_tokens_per_s"] > 0 < run["decode_tokens_per_s"]
        assert run["resident_bytes"]["peak"] >= run["resident_bytes"]["files"] > 0
    nano_cpu.main([*words, "--out", str(out)])
    assert "writing" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds another model"):
        nano_cpu.main(["--size", "toy", "--folder", str(folder), "--out", str(out)])


@pytest.mark.slow
def test_the_process_of_its_own_prints_a_measurement(tmp_path):
    write_checkpoint(nano_cpu.sizes()["toy"], tmp_path)
    found = nano_cpu.measure_apart(tmp_path, drafts=0, prompt=9, tokens=4)
    assert found["drafted_tokens"] == 0 < found["ready_s"]


def test_a_full_disk_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    usage = files.shutil._ntuple_diskusage(10**6, 0, 10**6)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    drawn = []
    monkeypatch.setattr(random_checkpoint, "_plain", lambda *given: drawn.append(given))
    with pytest.raises(StorageError, match=r"1\.0 MB free and this save needs \d\.\d MB"):
        write_checkpoint(CONFIG, tmp_path)
    assert not drawn
    assert not list(tmp_path.iterdir())
