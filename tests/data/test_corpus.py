"""Preparation: the split is kept apart, the cache answers, an interruption leaves nothing."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from nemotron3.config import from_record, to_record
from nemotron3.data import preparation
from nemotron3.data.corpus import (
    CorpusConfig,
    LoadTokenizerConfig,
    PreparedCorpus,
    TekkenTokenizerConfig,
    TrainTokenizerConfig,
    english_and_code,
    shakespeare_and_python,
)
from nemotron3.data.documents import FilesConfig
from nemotron3.data.preparation import corpus_key, prepare_corpus
from nemotron3.data.sources import PinnedConfig
from nemotron3.errors import ConfigError, DataError, StorageError

SMALL = TrainTokenizerConfig(vocab_size=400)


@pytest.fixture
def text(tmp_path):
    """40 documents in JSON lines; one spells a special token, one row is bad."""
    folder = tmp_path / "text"
    folder.mkdir()
    rows = [{"text": f"Document {i} says </s> naïvely.\n" * (i + 1)} for i in range(40)]
    lines = [json.dumps(row) for row in rows] + ["not json"]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def config(text):
    return CorpusConfig(
        sources=(FilesConfig(path=str(text), name="rows"),),
        tokenizer=SMALL,
        held_out_fraction=0.2,
    )


@pytest.fixture
def prepared(config, tmp_path):
    return prepare_corpus(config, cache=tmp_path / "cache")


def decoded(corpus, files):
    ids = [files["rows"].document(i).tolist() for i in range(len(files["rows"]))]
    assert all(document[-1] == corpus.tokenizer.eos_id for document in ids)
    assert all(corpus.tokenizer.eos_id not in document[:-1] for document in ids)
    return [corpus.tokenizer.decode(document[:-1]) for document in ids]


def test_every_document_is_on_one_side_and_comes_back(prepared, text):
    lines = (text / "rows.jsonl").read_text().splitlines()
    wanted = [json.loads(line)["text"] for line in lines if line.startswith("{")]
    train, held_out = decoded(prepared, prepared.train), decoded(prepared, prepared.held_out)
    assert sorted(train + held_out) == sorted(wanted)
    assert not set(train) & set(held_out)
    assert 0 < len(held_out) < 20
    assert [d.text for d in prepared.held_out_documents("rows")] == held_out


def test_manifest_counts_what_is_there(prepared):
    source = prepared.manifest.source("rows")
    assert source.bad_rows == {"not a JSON object": 1}
    assert source.first_bad_rows["not a JSON object"].endswith("rows.jsonl:41")
    assert source.train.documents + source.held_out.documents == 40
    assert source.held_out.bytes == sum(
        len(document.text.encode()) for document in prepared.held_out_documents("rows")
    )
    lengths = np.array(prepared.tokenizer.byte_lengths())
    for size, file in ((source.train, prepared.train), (source.held_out, prepared.held_out)):
        assert size.tokens == file["rows"].num_tokens
        assert size.bytes == lengths[file["rows"].tokens].sum()
    assert prepared.manifest.vocab_size == prepared.tokenizer.vocab_size


def test_tokenizer_never_sees_held_out_text(config, tmp_path, monkeypatch):
    seen = []
    real = preparation.Tokenizer.train.__func__

    def train(cls, documents, **options):
        seen.extend(documents)
        return real(cls, seen, **options)

    monkeypatch.setattr(preparation.Tokenizer, "train", classmethod(train))
    corpus = prepare_corpus(config, cache=tmp_path / "cache")
    held_out = {document.text for document in corpus.held_out_documents("rows")}
    assert seen
    assert not held_out & set(seen)


def test_second_run_opens_what_stands(config, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_prepare", None)
    again = prepare_corpus(config, cache=tmp_path / "cache")
    assert again.directory == prepared.directory
    assert again.names == ("rows",)


def test_the_key_follows_config_and_files(config, text):
    key = corpus_key(config)
    assert corpus_key(config) == key
    assert corpus_key(replace(config, held_out_fraction=0.3)) != key
    (text / "more.txt").write_text("more")
    assert corpus_key(config) != key


def test_preparing_twice_gives_the_same_bytes(config, tmp_path):
    one = prepare_corpus(config, directory=tmp_path / "one")
    two = prepare_corpus(config, directory=tmp_path / "two")
    files = sorted(p.relative_to(one.directory) for p in one.directory.rglob("*") if p.is_file())
    assert len(files) > 8
    for file in files:
        assert (one.directory / file).read_bytes() == (two.directory / file).read_bytes()


def test_killed_preparation_is_never_taken_for_finished(config, tmp_path):
    script = (
        "import os, signal, sys\n"
        "from nemotron3.data.corpus import CorpusConfig, TrainTokenizerConfig\n"
        "from nemotron3.data.documents import FilesConfig\n"
        "from nemotron3.data.preparation import prepare_corpus\n"
        "def kill(stage, done, total):\n"
        "    if stage == 'encode': os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare_corpus(eval(sys.argv[1]), directory=sys.argv[2], progress=kill)\n"
    )
    target = tmp_path / "out" / "corpus"
    command = [sys.executable, "-c", script, repr(config), str(target)]
    result = subprocess.run(command, check=False)
    assert result.returncode == -signal.SIGKILL
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == 1  # what the dead process left
    assert len(prepare_corpus(config, directory=target).train["rows"]) > 0


def test_failed_preparation_leaves_nothing(config, tmp_path, monkeypatch):
    def fail(*_):
        raise DataError("boom")

    monkeypatch.setattr(preparation, "_source_manifest", fail)
    with pytest.raises(DataError, match="boom"):
        prepare_corpus(config, directory=tmp_path / "out" / "corpus")
    assert list((tmp_path / "out").iterdir()) == []


def test_one_document_is_cut(tmp_path):
    file = tmp_path / "input.txt"
    file.write_text("".join(f"{i}. To be, or not to be.\n" for i in range(200)))
    config = CorpusConfig(sources=(FilesConfig(path=str(file)),), tokenizer=SMALL)
    corpus = prepare_corpus(config, cache=tmp_path / "cache")
    front = corpus.train_text("own-text", max_bytes=1_000_000)[0]
    (end,) = corpus.held_out_documents("own-text")
    assert front + end.text == file.read_text()
    assert end.text.startswith("19")


@pytest.mark.parametrize("names", [("book", "note"), ("a", "b"), ("note", "book")])
def test_a_book_beside_a_note_gives_its_share(tmp_path, names):
    """Whichever of the two the hash would hold out; the share is in the manifest."""
    for name, lines in zip(names, (12_000, 20), strict=True):
        text = "".join(f"{name} {i}: to be, or not to be.\n" for i in range(lines))
        (tmp_path / f"{name}.txt").write_text(text)
    config = CorpusConfig(sources=(FilesConfig(path=str(tmp_path)),), tokenizer=SMALL)
    corpus = prepare_corpus(config, directory=tmp_path / "out" / "corpus")
    source = corpus.manifest.source("own-text")
    assert source.held_out_share == pytest.approx(0.05, rel=0.2)
    assert corpus.manifest.held_out_share == source.held_out_share
    sizes = [file.stat().st_size for file in tmp_path.glob("*.txt")]
    assert source.train.bytes + source.held_out.bytes == sum(sizes)


def test_a_document_of_two_sources_is_on_one_side(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for n in range(30):
            own = f"own of {name} {n}\n" * 9
            text = f"shared {n}\n" * 10 if n % 3 == 0 else own
            (tmp_path / name / f"{n}.txt").write_text(text)
    sources = tuple(FilesConfig(path=str(tmp_path / n), name=n) for n in ("one", "two"))
    config = CorpusConfig(sources=sources, tokenizer=SMALL, held_out_fraction=0.2)
    corpus = prepare_corpus(config, directory=tmp_path / "corpus")
    trained, kept = set(), set()
    for name in ("one", "two"):
        trained.update(corpus.train_text(name, max_bytes=1_000_000))
        kept.update(document.text for document in corpus.held_out_documents(name))
    assert any("shared" in text for text in kept)
    assert not trained & kept


def test_too_little_text_to_hold_out(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    config = CorpusConfig(sources=(FilesConfig(path=str(tmp_path / "a.txt")),), tokenizer=SMALL)
    with pytest.raises(DataError, match="too few to hold a part out"):
        prepare_corpus(config, cache=tmp_path / "cache")


def test_loaded_tokenizer_is_used_and_decides_the_key(config, prepared, tmp_path):
    prepared.tokenizer.save(tmp_path / "model")
    loaded = replace(config, tokenizer=LoadTokenizerConfig(path=str(tmp_path / "model")))
    corpus = prepare_corpus(loaded, cache=tmp_path / "cache")
    assert corpus.tokenizer.fingerprint == prepared.tokenizer.fingerprint
    assert corpus.directory != prepared.directory
    assert np.array_equal(corpus.train["rows"].tokens, prepared.train["rows"].tokens)


def test_changes_to_a_prepared_corpus_are_noticed(prepared):
    tokenizer = prepared.directory / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<SPECIAL_31>", "<SPECIAL_X>"))
    with pytest.raises(DataError, match="not the tokenizer that made the ids"):
        _ = PreparedCorpus(prepared.directory).tokenizer
    tokens = prepared.directory / "train" / "rows.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"rows\.bin has"):
        PreparedCorpus(prepared.directory)
    (prepared.directory / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        PreparedCorpus(prepared.directory)
    with pytest.raises(DataError, match="it is no prepared corpus"):
        PreparedCorpus(prepared.directory / "train")


def test_directory_in_use_is_an_error(config, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty and no prepared corpus"):
        prepare_corpus(config, directory=tmp_path / "own")
    prepare_corpus(config, directory=tmp_path / "corpus")
    with pytest.raises(ConfigError, match="corpus of another config"):
        prepare_corpus(replace(config, held_out_fraction=0.3), directory=tmp_path / "corpus")


def test_a_place_that_cannot_be_written_to(config, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="set NEMOTRON3_CACHE"):
        prepare_corpus(config, directory=tmp_path / "file" / "corpus")


def test_text_that_changes_while_it_is_read(config, text, tmp_path):
    def change(stage, done, total):
        if stage == "survey":
            (text / "more.txt").write_text("more")

    with pytest.raises(DataError, match="changed while it was read"):
        prepare_corpus(config, cache=tmp_path / "cache", progress=change)


def test_progress_rises_to_the_whole(config, tmp_path):
    calls = []
    prepare_corpus(config, cache=tmp_path / "c", progress=lambda *call: calls.append(call))
    assert [stage for stage, _, _ in calls] == ["survey", "learn", "encode"]
    assert calls[-1][1] == calls[-1][2] > 0


def test_caps_hold_and_baseline_text_is_training_text(config, tmp_path):
    capped = replace(config, sources=(replace(config.sources[0], max_bytes=9000),))
    corpus = prepare_corpus(capped, cache=tmp_path / "cache")
    source = corpus.manifest.source("rows")
    assert 7000 < source.train.bytes + source.held_out.bytes <= 9000
    sample = corpus.train_sample(max_bytes=2000)
    assert 1500 < sum(len(text.encode()) for text in sample) < 2500
    assert all("</s>" in text for text in sample)
    with pytest.raises(ConfigError, match="'other' is none of rows"):
        corpus.train_text("other", max_bytes=1)


@pytest.mark.parametrize("recipe", [shakespeare_and_python, english_and_code])
def test_ready_made_configs_survive_the_record(recipe):
    assert from_record(CorpusConfig, to_record(recipe())) == recipe()
    tekken = recipe(tokenizer=TekkenTokenizerConfig())
    assert from_record(CorpusConfig, to_record(tekken)) == tekken


@pytest.mark.parametrize(
    "options",
    [
        {"sources": ()},
        {"sources": (PinnedConfig(name="go"), FilesConfig(path="x", name="go"))},
        {"held_out_fraction": 0.0},
        {"held_out_fraction": 1.0},
    ],
)
def test_config_checks(options):
    with pytest.raises(ConfigError):
        CorpusConfig(**{"sources": (PinnedConfig(name="go"),), **options})
    with pytest.raises(ConfigError):
        TrainTokenizerConfig(vocab_size=0)


@pytest.mark.slow
def test_the_default_corpus(tmp_path):
    corpus = prepare_corpus(shakespeare_and_python(), cache=tmp_path / "cache")
    assert corpus.manifest.vocab_size == 4096
    for source in corpus.manifest.sources:
        assert source.held_out.bytes > 50_000
        assert 2.5 < source.held_out.bytes / source.held_out.tokens < 4.0
