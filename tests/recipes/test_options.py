"""No option is dead: changing any value of a run changes what the run leaves behind."""

import json
from dataclasses import asdict, fields

import pytest
import torch
from safetensors.torch import load_file

from nemotron3.data import FilesConfig, PhaseConfig
from nemotron3.models.nvfp4_recipe import NVFP4Config
from nemotron3.recipes import run_pretrain
from nemotron3.training.parameter_groups import ParameterGroupConfig
from tests.small_run import lasting_metrics, leaves, small_run, with_leaf, write_text

CHANGES = {
    "name": "other",
    "corpus.sources": lambda run: run.corpus.sources[:1],
    "corpus.tokenizer.vocab_size": 310,
    "corpus.tokenizer.num_special_tokens": 40,
    "corpus.tokenizer.sample_bytes": 2000,
    "corpus.tokenizer.words": ("sailor", "clock"),
    "corpus.held_out_fraction": 0.3,
    "training.steps": 5,
    "training.batch_size": 2,
    "training.microbatch_size": 1,
    "training.seq_len": 16,
    "training.optimizer.lr": 2e-2,
    "training.optimizer.betas": (0.8, 0.95),
    "training.optimizer.eps": 1e-2,
    "training.optimizer.weight_decay": 0.5,
    "training.optimizer.clip_grad_norm": 0.1,
    "training.schedule.total_steps": 8,
    "training.schedule.warmup_steps": 1,
    "training.schedule.decay_steps": 2,
    "training.schedule.decay": "linear",
    "training.schedule.final_fraction": 0.5,
    "training.parameter_groups": (
        ParameterGroupConfig(name="mtp", parameters=("mtp.*",), is_frozen=True),
    ),
    "training.bias_update_rate": 0.1,
    "loss.mtp_loss_scaling": 1.0,
    "loss.balance_loss": 0.5,
    "training.precision.activations": "bfloat16",
    "training.evaluate_every_steps": 3,
    "training.checkpoint_every_steps": 2,
    "training.measure_every_steps": 3,
    "phases": (PhaseConfig(weights={"one": 9, "two": 1}),),
    "seed": 1,
    "retention.keep_last": 1,
    "retention.keep_every_steps": 2,
    "evaluation_rows": 1,
    "final_evaluation_rows": 1,
    "baselines.order": 3,
    "baselines.train_bytes": 500,
    "baselines.xz_train_bytes": 100,
    "prompts": ("my neighbour",),
    "sampling.max_tokens": 3,
    "sampling.temperature": 0.0,
    "sampling.top_p": 0.2,
    "sampling.top_k": 1,
    "sampling.stop_token_ids": tuple(range(32, 300)),
    "sampling.seed": 1,
}
# By design these change nothing in the result. Memory and place are looked at elsewhere:
# tests/training/test_pretrain_objective.py and tests/runtime/test_devices.py.
WITHOUT_TRACE = {"training.recompute", "device"}
# The first changes the model and the tokenizer with it: tests/recipes/test_initial_model.py. A
# recipe of few bits needs a model whose sizes its blocks divide, and its ingredients need it:
# tests/models/test_nvfp4_recipe.py.
NOT_ALONE = {"init_from", "training.precision.recipe"} | {
    f"training.precision.nvfp4.{field.name}" for field in fields(NVFP4Config)
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    text = tmp_path_factory.mktemp("text")
    sources = tuple(
        FilesConfig(path=str(write_text(text / name, documents=20, seed=seed)), name=name)
        for seed, name in enumerate(("one", "two"))
    )
    training = {"steps": 4, "checkpoint_every_steps": 1, "evaluate_every_steps": 2}
    run = small_run(text, training=training)
    run = with_leaf(run, "training.schedule.warmup_steps", 0)
    run = with_leaf(run, "training.schedule.decay_steps", 3)
    return with_leaf(run, "corpus.sources", sources)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


def trace(run, folder, kept, monkeypatch):
    """What a run leaves behind, without what hangs on the clock."""
    monkeypatch.setenv("NEMOTRON3_CACHE", str(kept / "cache"))
    monkeypatch.setattr(run_pretrain, "measure_product_rate", lambda *_, **__: 1e9)
    summary = asdict(run_pretrain.pretrain(run, runs=folder))
    del summary["seconds"]
    weights = load_file(folder / run.name / "model" / "model.safetensors")
    return {
        "summary": json.dumps(summary),
        "metrics": lasting_metrics(folder / run.name),
        "files": sorted(
            str(file.relative_to(folder))
            for file in folder.rglob("*")
            if "tensorboard" not in file.parts
        ),
        "weights": {name: float(tensor.double().sum()) for name, tensor in weights.items()},
    }


@pytest.fixture(scope="module")
def unchanged(base, kept):
    with pytest.MonkeyPatch.context() as monkeypatch:
        torch.set_num_threads(1)
        return trace(base, kept / "base", kept, monkeypatch)


def test_every_option_is_in_the_table(base):
    options = {
        path
        for path in leaves(base)
        if not path.startswith("model.") and path.rpartition(".")[2] != "kind"
    }
    assert options == CHANGES.keys() | WITHOUT_TRACE | NOT_ALONE


@pytest.mark.slow
def test_the_same_run_leaves_the_same(base, kept, unchanged, tmp_path, monkeypatch):
    assert trace(base, tmp_path, kept, monkeypatch) == unchanged
    recomputed = with_leaf(base, "training.recompute", True)
    found = trace(recomputed, tmp_path / "recomputed", kept, monkeypatch)
    assert found["files"] == unchanged["files"]
    assert found["weights"] == pytest.approx(unchanged["weights"], rel=1e-2, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("path", CHANGES)
def test_an_option_leaves_a_trace(path, base, kept, unchanged, tmp_path, monkeypatch):
    value = CHANGES[path]
    changed = with_leaf(base, path, value(base) if callable(value) else value)
    found = trace(changed, tmp_path, kept, monkeypatch)
    differing = [part for part in unchanged if found[part] != unchanged[part]]
    assert differing, f"{path} changed nothing"
