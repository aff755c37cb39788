"""What a run may say of itself, and what a small one does on the way to its end."""

import json
from dataclasses import replace

import pytest

from nemotron3.config import from_record, to_record
from nemotron3.data import FilesConfig, LoadTokenizerConfig, TokenizedConfig, TokenizedSource
from nemotron3.errors import ConfigError, DependencyMissingError
from nemotron3.recipes import run_folder, run_pretrain
from nemotron3.recipes.load import RECIPES
from nemotron3.recipes.pretrain import PretrainRun, tiny
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_pretrain import pretrain
from tests.small_run import small_run, with_leaf, write_text


class Listener(RunCallback):
    """Keeps what it is told."""

    def __init__(self):
        self.stages, self.steps, self.parts = [], [], set()

    def stage(self, message):
        self.stages.append(message)

    def progress(self, what, done, total):  # noqa: ARG002
        assert done >= 0
        self.parts.add(what)

    def trained(self, report):
        assert report.steps >= report.step
        self.steps.append(report.step)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON3_CACHE", str(tmp_path / "cache"))
    return write_text(tmp_path / "text", documents=20)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden"])
def test_a_name_must_be_a_folders(name):
    with pytest.raises(ConfigError, match="names a folder"):
        replace(tiny(), name=name)


def test_a_tokenizer_larger_than_the_model_is_refused_before_any_text_is_read():
    with pytest.raises(ConfigError, match=r"vocab_size is 9000, more than model\.vocab_size 1024"):
        with_leaf(tiny(), "corpus.tokenizer.vocab_size", 9000)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_end_their_schedule_with_their_training(name):
    run = RECIPES[name]()
    assert run.training.schedule.total_steps == run.training.steps
    assert (RECIPES[name].__doc__ or "").count("\n") == 0


def test_a_callback_hears_of_every_stage_and_step(text, tmp_path):
    listener = Listener()
    pretrain(small_run(text, training={"steps": 2}), runs=tmp_path / "runs", callback=listener)
    assert listener.steps == [1, 2]
    assert listener.stages[0].startswith("Memory, at most about ")
    assert listener.stages[1] == "Preparing the corpus"
    assert {"survey", "learn", "encode"} <= listener.parts
    assert not any("scheduled" in message for message in listener.stages)


def test_a_schedule_longer_than_the_training_is_said(text, tmp_path):
    listener = Listener()
    run = small_run(text, training={"steps": 2})
    run = with_leaf(run, "training.schedule.total_steps", 50)
    pretrain(run, runs=tmp_path / "runs", callback=listener)
    assert any("scheduled for 50 steps and training ends after 2" in m for m in listener.stages)


def test_prompts_are_continued_and_held_out_text_is_where_none_are_given(text, tmp_path):
    run = small_run(text, training={"steps": 1})
    own = pretrain(run, runs=tmp_path / "runs")
    (kept,) = (tmp_path / "cache").rglob("held_out/*.jsonl")
    texts = [json.loads(line)["text"] for line in kept.read_text("utf-8").splitlines()]
    assert [sample["prompt"] for sample in own.samples] == [t[:24] for t in texts[:3]]
    written = "".join(file.read_text("utf-8") for file in text.iterdir())
    assert texts
    assert all(part in written for part in texts)
    assert own.held_out_bytes == sum(len(part.encode()) for part in texts)
    assert own.held_out_share == pytest.approx(own.held_out_bytes / len(written.encode()))
    assert own.held_out_share == pytest.approx(0.1, rel=0.25)
    given = replace(run, name="given", prompts=("the old", "a"))
    summary = pretrain(given, runs=tmp_path / "runs")
    assert [sample["prompt"] for sample in summary.samples] == ["the old", "a"]


def test_a_run_leaves_its_record_its_corpus_and_what_it_ran_on(text, tmp_path):
    run = small_run(text, training={"steps": 1})
    pretrain(run, runs=tmp_path / "runs")
    folder = tmp_path / "runs" / "small"
    record = json.loads((folder / "run.json").read_text("utf-8"))
    assert record["extra"]["backends"].keys() >= {"ssd", "conv", "attention", "experts"}
    assert record["extra"]["device"].endswith("1 thread")
    assert record["extra"]["corpus"]["sources"][0]["origin"] == str(text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        kept, of_model = (folder / part / name for part in ("tokenizer", "model"))
        assert kept.read_bytes() == of_model.read_bytes()


def test_a_run_that_died_before_its_report_is_finished_by_the_next(text, tmp_path, monkeypatch):
    run = small_run(text, training={"steps": 2})

    def fails(*_, **__):
        raise OSError("disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(run_pretrain, "write_report", fails)
        with pytest.raises(OSError, match="disk is gone"):
            pretrain(run, runs=tmp_path / "runs")
    listener = Listener()
    summary = pretrain(run, runs=tmp_path / "runs", callback=listener)
    assert listener.steps == []  # nothing is trained again
    assert summary.tokens == 2 * 4 * 32
    assert (tmp_path / "runs/small/report.html").exists()
    backends = json.loads((tmp_path / "runs/small/run.json").read_text("utf-8"))["extra"]
    assert "ssd" in backends["backends"]


def test_a_loaded_tokenizer_larger_than_the_model_is_an_error(text, tmp_path):
    first = small_run(text, training={"steps": 1})
    pretrain(first, runs=tmp_path / "runs")
    loaded = LoadTokenizerConfig(path=str(tmp_path / "runs/small/tokenizer"))
    run = replace(
        first,
        name="second",
        corpus=replace(first.corpus, tokenizer=loaded),
        model=replace(first.model, vocab_size=100),
    )
    with pytest.raises(ConfigError, match=r"320 entries and model\.vocab_size is 100; set --model"):
        pretrain(run, runs=tmp_path / "runs")


def test_without_tensorboard_the_install_line_is_given(text, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise ImportError("needs tensorboard: pip install 'nemotron3[train]'")

    monkeypatch.setattr(run_folder, "TensorBoardSink", missing)
    with pytest.raises(DependencyMissingError, match="pip install"):
        pretrain(small_run(text, training={"steps": 1}), runs=tmp_path / "runs")


def test_bits_per_byte_of_all_text_is_the_mean_by_bytes(text, tmp_path):
    other = write_text(tmp_path / "other", documents=40, seed=5)
    run = small_run(text, training={"steps": 2})
    sources = (FilesConfig(path=str(text), name="one"), FilesConfig(path=str(other), name="two"))
    run = replace(run, corpus=replace(run.corpus, sources=sources))
    summary = pretrain(run, runs=tmp_path / "runs")
    record = json.loads((tmp_path / "runs/small/run.json").read_text("utf-8"))
    sizes = {s["name"]: s["held_out"]["bytes"] for s in record["extra"]["corpus"]["sources"]}
    mean = sum(summary.by_source[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert summary.bits_per_byte == pytest.approx(mean)
    assert summary.by_source.keys() == sizes.keys() == {"one", "two"}


def test_token_files_train_as_the_text_they_were_made_from(text, tmp_path):
    run = small_run(text, training={"steps": 2})
    wanted = pretrain(run, runs=tmp_path / "runs")
    (prepared,) = (tmp_path / "cache" / "corpora").iterdir()
    source = TokenizedSource(
        name="own-text",
        train=str(prepared / "train" / "own-text"),
        held_out=str(prepared / "held_out" / "own-text"),
    )
    corpus = TokenizedConfig(
        sources=(source,), tokenizer=LoadTokenizerConfig(path=str(prepared / "tokenizer"))
    )
    again = replace(run, name="tokens", corpus=corpus)
    assert from_record(PretrainRun, to_record(again)) == again
    found = pretrain(again, runs=tmp_path / "runs")
    assert found.bits_per_byte == wanted.bits_per_byte
    assert found.baselines["gzip"] == wanted.baselines["gzip"]
