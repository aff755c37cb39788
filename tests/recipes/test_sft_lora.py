"""Fine-tuning runs that train an adapter: what is trained, kept, resumed and merged."""

import json

import pytest
import torch
from safetensors import safe_open

from nemotron3 import LLM, SamplingParams
from nemotron3.checkpoint.store import CheckpointStore
from nemotron3.config import from_record, to_record
from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.lora import LoRAConfig, read_adapter
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import PrecisionConfig
from nemotron3.recipes.adapters import merge_adapter_directory
from nemotron3.recipes.run_sft import sft
from nemotron3.recipes.sft import SFTRun
from tests.recipes.test_sft import check_that_a_killed_run_goes_on, rows, small
from tests.rl.playground import save_policy
from tests.small_run import Listener

LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def chats(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(40)), encoding="utf-8")
    return file


def tuned(base, chats, runs, *, lora=LORA, callback=None, **training):
    run = small(base, chats, lora=lora, training={"bias_update_rate": 0.0, **training})
    return sft(run, runs=runs, callback=callback)


def answers(llm):
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1)
    output = llm.chat([{"role": "user", "content": "clock road"}], params)[0].outputs[0]
    return output.token_ids, [entry.logprob for entry in output.logprobs]


def test_a_run_trains_an_adapter_that_is_the_model(base, chats, tmp_path):
    listener = Listener()
    summary = tuned(base, chats, tmp_path / "runs", callback=listener)
    folder = tmp_path / "runs" / "small"
    assert summary.loss["all"] < summary.loss_before["all"]
    said = next(stage for stage in listener.said if stage.startswith("Trained are"))
    assert "routed experts" in said
    assert "router                          frozen" in said

    # Checkpoints hold the adapter and its moments, and nothing of the base model.
    store = CheckpointStore(folder / "checkpoints")
    names = store.load().tensors.keys()
    assert all(name.endswith((".A", ".B")) for name in names)
    assert not (folder / "best").exists()

    adapted, merged = LLM(base, lora=folder / "adapter"), LLM(folder / "model")
    assert answers(adapted) == answers(merged)
    assert adapted.template.to_jinja() == merged.template.to_jinja()
    out = tmp_path / "merged"
    merge_adapter_directory(base, folder / "adapter", out)
    kept = {file.name for file in (folder / "model").iterdir()}
    assert {file.name for file in out.iterdir()} == kept
    theirs = LanguageModel.from_pretrained(folder / "model").state_dict()
    for name, tensor in LanguageModel.from_pretrained(out).state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for file in kept - {"model.safetensors"}:
        assert (out / file).read_bytes() == (folder / "model" / file).read_bytes(), file

    # Whatever is no product is the base model's, to the bit.
    before = LanguageModel.from_pretrained(base)
    adapter = read_adapter(folder / "adapter", before)
    changed = {name if name in theirs else f"{name}.weight" for name in adapter}
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, theirs[name]) == (name not in changed), name
    again = tuned(base, chats, tmp_path / "runs")
    assert again == summary


@pytest.mark.parametrize(
    "activations", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)]
)
def test_a_run_that_was_killed_goes_on_to_the_same_adapter(base, chats, tmp_path, activations):
    precision = PrecisionConfig(activations=activations)
    every_step = {"checkpoint_every_steps": 1, "evaluate_every_steps": 1, "precision": precision}
    check_that_a_killed_run_goes_on(
        lambda runs: tuned(base, chats, runs, **every_step),
        tmp_path,
        files=("adapter/adapter_model.safetensors", "model/model.safetensors"),
    )


@pytest.mark.slow
def test_frozen_weights_in_bfloat16_are_trained_beside_and_merged(base, chats, tmp_path):
    precision = PrecisionConfig(activations="bfloat16")
    summary = tuned(base, chats, tmp_path / "runs", precision=precision)
    assert summary.loss["all"] < summary.loss_before["all"]
    folder, out = tmp_path / "runs" / "small", tmp_path / "merged"
    saved = CheckpointStore(folder / "checkpoints").load().tensors
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    with safe_open(folder / "adapter/adapter_model.safetensors", framework="pt") as file:
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - no dict
    assert dtypes == {torch.float32}
    result = LanguageModel.from_pretrained(folder / "model")
    assert result.output_weight.dtype == torch.bfloat16
    # Of the float32 model that it was trained on, the adapter makes the same, to the rounding.
    merge_adapter_directory(base, folder / "adapter", out)
    merged = LanguageModel.from_pretrained(out)
    assert merged.output_weight.dtype == torch.float32
    tokens = torch.arange(40).view(2, 20) + 20
    with torch.no_grad():
        ours = LanguageModel.from_pretrained(folder / "model", dtype=torch.float32)(tokens)
        theirs, before = merged(tokens), LanguageModel.from_pretrained(base)(tokens)
    learned = (theirs - before).norm()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (ours - theirs).norm() < 0.1 * learned


@pytest.mark.slow
def test_of_a_bfloat16_model_the_result_is_what_merge_adapter_makes(base, chats, tmp_path):
    model, out = tmp_path / "model", tmp_path / "merged"
    LanguageModel.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(model)
    precision = PrecisionConfig(activations="bfloat16")
    tuned(model, chats, tmp_path / "runs", precision=precision)
    folder = tmp_path / "runs" / "small"
    merge_adapter_directory(model, folder / "adapter", out)
    merged = LanguageModel.from_pretrained(out).state_dict()
    for name, tensor in LanguageModel.from_pretrained(folder / "model").state_dict().items():
        assert torch.equal(tensor, merged[name]), name


def test_a_run_that_was_killed_while_it_merged_merges_again(
    base,
    chats,
    tmp_path,
    monkeypatch,
):
    def die(self, folder, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "save_pretrained", die)
        with pytest.raises(KeyboardInterrupt):
            tuned(base, chats, tmp_path / "runs")
    folder = tmp_path / "runs/small"
    assert (folder / "adapter").exists()
    assert not (folder / "model").exists()
    tuned(base, chats, tmp_path / "runs")
    assert answers(LLM(base, lora=folder / "adapter")) == answers(LLM(folder / "model"))


def test_a_checkpoint_of_another_rank_is_refused(base, chats, tmp_path):
    tuned(base, chats, tmp_path / "runs")
    other = LoRAConfig(rank=2, alpha=8.0)
    with pytest.raises(ConfigError, match=r"first lora.rank: 4 there, 2 now"):
        tuned(base, chats, tmp_path / "runs", lora=other)


def test_wrong_runs_are_refused_before_work(base, chats, tmp_path):
    with pytest.raises(ConfigError, match="selection biases belong to the frozen model"):
        small(base, chats, lora=LORA)
    wrong = LoRAConfig(targets=("in_proj", "upproj"))
    with pytest.raises(ConfigError, match="the closest are up_proj"):
        tuned(base, chats, tmp_path / "runs", lora=wrong)
    assert not (tmp_path / "runs/small/checkpoints").exists()


def test_the_record_of_a_run_has_its_adapter(base, chats):
    run = small(base, chats, lora=LORA, training={"bias_update_rate": 0.0})
    assert from_record(SFTRun, json.loads(json.dumps(to_record(run)))) == run


def test_a_merge_keeps_what_the_adapter_has_not(base, chats, tmp_path):
    """An adapter from elsewhere is two files; all others, and the dtype, are the model's."""
    model = tmp_path / "model"
    tuned(base, chats, tmp_path / "runs")
    source = LanguageModel.from_pretrained(tmp_path / "runs/small/model", dtype=torch.bfloat16)
    source.save_pretrained(model)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_bytes((tmp_path / "runs/small/adapter" / name).read_bytes())
    assert merge_adapter_directory(model, adapter, out).num_products > 10
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="is not empty"):
        merge_adapter_directory(model, adapter, out)
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json"):
        merge_adapter_directory(model, model, tmp_path / "other")
