"""A pre-training run that continues a model directory: what it takes over, and what it refuses."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from nemotron3.checkpoint.retention import RetentionConfig
from nemotron3.cli.main import main
from nemotron3.data import (
    FilesConfig,
    Loader,
    LoadTokenizerConfig,
    PhaseSchedule,
    TrainTokenizerConfig,
)
from nemotron3.data.preparation import prepare_corpus
from nemotron3.errors import CheckpointError, ConfigError, DataError
from nemotron3.models.huggingface import read_config
from nemotron3.models.layout import SequenceLayout
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.precision import convert_weights
from nemotron3.observe.metrics import read_metrics
from nemotron3.recipes.initial_model import continued
from nemotron3.recipes.merging import merge_run
from nemotron3.recipes.run_folder import RunCallback, read_summary
from nemotron3.recipes.run_pretrain import PretrainSummary, pretrain
from nemotron3.text import Tokenizer
from tests.small_run import (
    VOCABULARY,
    StopAt,
    StoppedError,
    lasting_metrics,
    small_run,
    with_leaf,
    write_text,
)
from tests.tiny import tiny_config

TEMPLATE = "{{ messages[0].content }}"
GENERATION = {"eos_token_id": [2, 11], "temperature": 0.6, "my_note": "kept"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A trained toy in `toy/`, with all that a published directory has beside its weights."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("home")
    write_text(home / "text", documents=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOTRON3_CACHE", str(home / "cache"))
        pretrain(small_run(home / "text"), runs=home / "runs")
    toy = shutil.copytree(home / "runs/small/model", home / "toy")
    (toy / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (toy / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    (toy / "modeling_own.py").write_text("# code of the model's own\n", encoding="utf-8")
    config = json.loads((toy / "config.json").read_text("utf-8")) | {"my_field": [1, None]}
    (toy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return home


@pytest.fixture
def toy(home, tmp_path, monkeypatch):
    """A copy of the toy that a test may spoil."""
    torch.set_num_threads(1)
    monkeypatch.setenv("NEMOTRON3_CACHE", str(home / "cache"))
    return shutil.copytree(home / "toy", tmp_path / "toy")


def run_on(toy, home, **changes):
    training = {"steps": 4, "checkpoint_every_steps": 2} | changes.pop("training", {})
    return continued(small_run(home / "text", training=training, **changes), str(toy))


def test_a_run_begins_where_the_directory_stands(home, toy, tmp_path):
    before = read_summary(home / "runs/small", PretrainSummary)
    assert before.bits_per_byte_before is None
    run = run_on(toy, home)
    assert (run.name, run.init_from) == ("small-continued", str(toy))
    assert run.model == read_config(toy)
    summary = pretrain(run, runs=tmp_path / "runs")
    assert summary.bits_per_byte_before == pytest.approx(before.bits_per_byte, rel=1e-6)
    assert summary.bits_per_byte < before.bits_per_byte
    assert summary.compared["before training"] == summary.bits_per_byte_before
    first = dict(read_metrics(tmp_path / "runs/small-continued/metrics.jsonl"))[1]
    assert first["train/loss"] == pytest.approx(loss_of_first_batch(run), rel=1e-5)


def loss_of_first_batch(run):
    """The directory's loss on what the run's first update reads."""
    corpus = prepare_corpus(run.corpus, progress=lambda *_: None)
    config, files = run.training, dict(corpus.train)
    schedule = PhaseSchedule.build(
        run.phases,
        total_samples=config.steps * config.batch_size,
        num_tokens={name: file.num_tokens for name, file in files.items()},
    )
    size = config.batch_size
    batch = Loader(files, schedule, seq_len=config.seq_len, batch_size=size, seed=run.seed).batch(0)
    model = LanguageModel.from_pretrained(run.init_from, dtype=torch.float32)
    layout = SequenceLayout.packed(batch.lengths)
    with torch.no_grad():
        logits = model(batch.tokens, layout=layout)
    losses = F.cross_entropy(logits, batch.targets, reduction="none")
    return float((losses * batch.loss_mask).sum() / batch.loss_mask.sum())


def outcome(folder):
    model = (folder / "model/model.safetensors").read_bytes()
    summary = read_summary(folder, PretrainSummary)
    return (
        hashlib.sha256(model).hexdigest(),
        lasting_metrics(folder),
        (summary.bits_per_byte_before, summary.bits_per_byte, summary.samples),
    )


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(home, toy, tmp_path, stop):
    run = run_on(toy, home)
    pretrain(run, runs=tmp_path / "whole")
    with pytest.raises(StoppedError):
        pretrain(run, runs=tmp_path / "runs", callback=StopAt(stop))
    pretrain(run, runs=tmp_path / "runs")
    folders = (tmp_path / name / run.name for name in ("runs", "whole"))
    assert outcome(next(folders)) == outcome(next(folders))


def train_until_killed(run, runs, cache):
    """What a process does: train until a step at which nothing of it is left."""
    torch.set_num_threads(1)
    os.environ["NEMOTRON3_CACHE"] = cache

    class Kill(RunCallback):
        def trained(self, report):
            if report.step == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    pretrain(run, runs=runs, callback=Kill())


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_losses(home, toy, tmp_path):
    run = run_on(toy, home)
    pretrain(run, runs=tmp_path / "whole")
    arguments = (run, tmp_path / "runs", str(home / "cache"))
    process = multiprocessing.get_context("spawn").Process(
        target=train_until_killed, args=arguments
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    pretrain(run, runs=tmp_path / "runs")
    folders = (tmp_path / name / run.name for name in ("runs", "whole"))
    assert outcome(next(folders)) == outcome(next(folders))


def spoil_weights(toy):
    file = toy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "edited: {toy}/model.safetensors"


def spoil_template(toy):
    (toy / "chat_template.jinja").write_text("other", encoding="utf-8")
    return "edited: {toy}/chat_template.jinja"


def lose_defaults(toy):
    (toy / "generation_config.json").unlink()
    return "removed: {toy}/generation_config.json"


@pytest.mark.parametrize("change", [spoil_weights, spoil_template, lose_defaults])
def test_a_directory_that_changed_is_noticed_on_resume(home, toy, tmp_path, change):
    run, folder = run_on(toy, home), tmp_path / "runs/small-continued"
    with pytest.raises(StoppedError):
        pretrain(run, runs=tmp_path / "runs", callback=StopAt(3))
    what = change(toy).format(toy=toy)
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError) as raised:
        pretrain(run, runs=tmp_path / "runs")
    assert f"began with another model ({what})" in str(raised.value)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == files


def test_without_a_checkpoint_the_present_directory_is_measured_anew(home, toy, tmp_path):
    run = run_on(toy, home)
    with pytest.raises(StoppedError):
        pretrain(run, runs=tmp_path / "runs", callback=StopAt(1))
    model = LanguageModel.from_pretrained(toy)
    with torch.no_grad():
        model.backbone.norm_f.weight.mul_(0.5)
    model.save_pretrained(toy)
    found = pretrain(run, runs=tmp_path / "runs").bits_per_byte_before
    assert found == pretrain(run, runs=tmp_path / "other").bits_per_byte_before
    assert found != read_summary(home / "runs/small", PretrainSummary).bits_per_byte


def test_all_that_the_directory_says_is_in_the_result(home, toy, tmp_path):
    pretrain(run_on(toy, home), runs=tmp_path / "runs")
    model = tmp_path / "runs/small-continued/model"
    assert (model / "chat_template.jinja").read_text("utf-8") == TEMPLATE
    assert (model / "modeling_own.py").exists()
    assert json.loads((model / "generation_config.json").read_text("utf-8")) == GENERATION
    assert json.loads((model / "config.json").read_text("utf-8"))["my_field"] == [1, None]
    one, two = (Tokenizer.from_directory(folder) for folder in (model, toy))
    assert (one.fingerprint, one.chat_template) == (two.fingerprint, two.chat_template)


def test_a_corpus_of_a_model_with_another_template_lends_its_ids_alone(home, toy, tmp_path):
    """Both tokenizers give the same ids, so both runs read one prepared corpus."""
    pretrain(run_on(toy, home, name="first"), runs=tmp_path / "runs")
    (toy / "chat_template.jinja").write_text("another", encoding="utf-8")
    pretrain(run_on(toy, home, name="second"), runs=tmp_path / "runs")
    result = Tokenizer.from_directory(tmp_path / "runs/second-continued/model")
    assert result.chat_template == "another"


def test_a_merge_of_its_checkpoints_is_as_complete(home, toy, tmp_path):
    run = run_on(toy, home, retention=RetentionConfig(keep_every_steps=2))
    pretrain(run, runs=tmp_path / "runs")
    merge_run(tmp_path / "runs" / run.name, tmp_path / "out", window_steps=None, kind="linear")
    assert (tmp_path / "out/chat_template.jinja").read_text("utf-8") == TEMPLATE
    generation = json.loads((tmp_path / "out/generation_config.json").read_text("utf-8"))
    assert generation == GENERATION


def test_bfloat16_weights_are_trained_as_float32_masters(home, toy, tmp_path):
    tensors = load_file(toy / "model.safetensors")
    narrow = {
        name: tensor if name.endswith(("A_log", "D", "dt_bias", "bias")) else tensor.bfloat16()
        for name, tensor in tensors.items()
    }
    save_file(narrow, toy / "model.safetensors")
    assert LanguageModel.from_pretrained(toy).output_weight.dtype == torch.bfloat16
    # An update this small is lost in bfloat16.
    run = with_leaf(run_on(toy, home), "training.optimizer.lr", 1e-6)
    pretrain(run, runs=tmp_path / "runs")
    result = load_file(tmp_path / "runs/small-continued/model/model.safetensors")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    wide = narrow["backbone.embeddings.weight"].float()
    moved = (result["backbone.embeddings.weight"] - wide).abs().max()
    assert 0 < moved < 1e-5


@pytest.mark.parametrize("pattern", ["ME*-E", "ME*-E/*E"])
def test_depths_are_those_of_the_directory(home, toy, tmp_path, pattern):
    config = tiny_config(pattern, vocab_size=VOCABULARY, hidden_size=32)
    LanguageModel.from_config(config, seed=3).save_pretrained(toy)
    run = run_on(toy, home)
    assert run.model.hybrid_override_pattern == pattern
    pretrain(run, runs=tmp_path / "runs")
    metrics = dict(read_metrics(tmp_path / "runs/small-continued/metrics.jsonl"))[1]
    depths = [name for name in metrics if name.startswith("train/loss_mtp")]
    assert len(depths) == pattern.count("/")


def test_own_notes_continue_a_model_in_one_line(home, toy, tmp_path, capsys):
    options = {
        "--data": home / "text",
        "--init-from": toy,
        "--runs": tmp_path / "runs",
        "--device": "cpu",
        "--training.steps": 2,
        "--training.batch-size": 2,
        "--training.microbatch-size": 2,
        "--training.seq-len": 32,
        "--training.optimizer.lr": 1e-4,
        "--sampling.max-tokens": 2,
    }
    words = [str(word) for option in options.items() for word in option]
    assert main(["pretrain", "tiny", *words]) == 0
    printed = capsys.readouterr().out
    assert "before training" in printed
    assert str(tmp_path / "runs/tiny-continued-own-text/model") in printed


# What is refused, before any text is read.


def no_directory(toy):
    shutil.rmtree(toy)
    return CheckpointError, "is no directory; give a model directory, such as runs/tiny/model"


def no_config(toy):
    (toy / "config.json").unlink()
    return CheckpointError, "holds no config.json"


def a_run(toy):
    shutil.copytree(toy, toy.parent / "model")
    for file in toy.iterdir():
        file.unlink()
    (toy.parent / "model").rename(toy / "model")
    return CheckpointError, f"give {toy}/model"


def no_weights(toy):
    (toy / "model.safetensors").unlink()
    return CheckpointError, "safetensors"


def a_missing_tensor(toy):
    tensors = load_file(toy / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, toy / "model.safetensors")
    return CheckpointError, "lacks 1 tensors that config.json calls for, first 'lm_head.weight'"


def narrow_weights(toy):
    convert_weights(LanguageModel.from_pretrained(toy), "int8").save_pretrained(toy)
    return ConfigError, "stored in int8, which has no gradients"


def a_larger_tokenizer(toy):
    letters = "".join(chr(code) for code in range(97, 123))
    text = [a + b + c for a in letters for b in letters for c in "xyz"] * 3
    Tokenizer.train(text, vocab_size=VOCABULARY + 50).save(toy)
    return ConfigError, f"has {VOCABULARY + 50} entries and whose model has {VOCABULARY}"


def no_tokenizer(toy):
    (toy / "tokenizer.json").unlink()
    return DataError, "holds no tokenizer.json"


REFUSED = [
    no_directory, no_config, a_run, no_weights, a_missing_tensor, narrow_weights,
    a_larger_tokenizer, no_tokenizer,
]  # fmt: skip


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_directory_that_cannot_be_continued_is_refused_at_once(home, toy, tmp_path, spoil):
    kind, message = spoil(toy)
    with pytest.raises(kind) as raised:
        pretrain(run_on(toy, home), runs=tmp_path / "runs")
    assert str(toy) in str(raised.value)
    assert message in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_another_architecture_is_refused_by_its_fields(home, toy, tmp_path):
    run = run_on(toy, home)
    run = with_leaf(run, "model.mamba.ssm_state_size", 12)
    run = with_leaf(run, "model.layer_norm_epsilon", 1e-3)
    with pytest.raises(ConfigError) as raised:
        pretrain(run, runs=tmp_path / "runs")
    for part in ("model.is not", "mamba.ssm_state_size is 12, 10 there", "layer_norm_epsilon is"):
        assert part.replace("model.is", "model is") in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_another_tokenizer_is_refused(home, toy, tmp_path):
    other = tmp_path / "tokenizer"
    Tokenizer.train(["something else"] * 5, vocab_size=300).save(other)
    run = run_on(toy, home)
    loaded = LoadTokenizerConfig(path=str(other))
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer is not the tokenizer of"):
        pretrain(replace(run, corpus=replace(run.corpus, tokenizer=loaded)), runs=tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"corpus\.tokenizer learns a new vocabulary"):
        replace(run, corpus=replace(run.corpus, tokenizer=TrainTokenizerConfig(vocab_size=300)))


def test_a_directory_without_a_tokenizer_takes_the_runs(home, toy, tmp_path):
    other = tmp_path / "tokenizer"
    Tokenizer.from_directory(toy).save(other)
    (toy / "tokenizer.json").unlink()
    run = run_on(toy, home)
    loaded = LoadTokenizerConfig(path=str(other))
    pretrain(replace(run, corpus=replace(run.corpus, tokenizer=loaded)), runs=tmp_path / "runs")
    Tokenizer.from_directory(tmp_path / "runs/small-continued/model")


def test_the_text_is_the_recipes_own(home, toy):
    run = run_on(toy, home)
    assert run.corpus.sources == (FilesConfig(path=str(home / "text")),)
    assert run.corpus.tokenizer == LoadTokenizerConfig(path=str(toy))
