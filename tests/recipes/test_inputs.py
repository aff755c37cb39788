"""A run that goes on stands on the data that it began with, or says what changed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.speculation import held_out_of

from nemotron3.cli.main import main
from nemotron3.config import from_record
from nemotron3.data import LoadTokenizerConfig, PinnedConfig, TokenizedConfig, TokenizedSource
from nemotron3.data import preparation as preparation_module
from nemotron3.data.corpus import PreparedCorpus
from nemotron3.data.preparation import prepare_corpus
from nemotron3.errors import ConfigError, DataError, Nemotron3Error
from nemotron3.recipes import inputs
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.recipes.run_pretrain import pretrain
from nemotron3.text import Tokenizer
from tests.small_run import lasting_metrics, small_run, with_leaf, write_text

STEPS = 6


class StoppedError(Exception):
    """A test's own interruption."""


class Listener(RunCallback):
    """Keeps what it is told, and stops a run at a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.stages, self.steps = stop_at, [], []

    def stage(self, message):
        self.stages.append(message)

    def trained(self, report):
        self.steps.append(report.step)
        if report.step == self.stop_at:
            raise StoppedError


class Place:
    """Text, a cache, and the run on them."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.folder, self.text, self.runs = folder, folder / "text", folder / "runs"
        write_text(self.text, documents=20)
        self.run = small_run(self.text, training={"steps": STEPS, "checkpoint_every_steps": 2})

    def start(self, stop_at: int | None = None, **changes) -> Listener:
        listener = Listener(stop_at)
        run = replace(self.run, **changes)
        if stop_at is None:
            pretrain(run, runs=self.runs, callback=listener)
        else:
            with pytest.raises(StoppedError):
                pretrain(run, runs=self.runs, callback=listener)
        return listener

    @property
    def run_folder(self) -> Path:
        return self.runs / "small"

    @property
    def corpora(self) -> list[Path]:
        return sorted((self.folder / "cache" / "corpora").iterdir())

    def content(self) -> dict[str, bytes]:
        files = (file for file in self.run_folder.rglob("*") if file.is_file())
        return {str(file.relative_to(self.run_folder)): file.read_bytes() for file in files}

    def result(self) -> tuple[object, list[str]]:
        weights = (self.run_folder / "model" / "model.safetensors").read_bytes()
        return weights, lasting_metrics(self.run_folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What comes out where nothing is interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOTRON3_CACHE", str(folder / "cache"))
        place = Place(folder)
        place.start()
        return place.result()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON3_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path)


def edit(text: Path) -> str:
    (text / "003.txt").write_text("Something else entirely, and longer.\n" * 40)
    return "edited: {text}/003.txt"


def edit_in_place(text: Path) -> str:
    """A change of one letter that leaves size and date as they were."""
    file = text / "003.txt"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return "edited: {text}/003.txt"


def add(text: Path) -> str:
    (text / "more.txt").write_text("One more document.\n")
    return "added: {text}/more.txt"


def remove(text: Path) -> str:
    (text / "003.txt").unlink()
    return "removed: {text}/003.txt"


def rename(text: Path) -> str:
    (text / "003.txt").rename(text / "zzz.txt")
    return "renamed: {text}/003.txt to {text}/zzz.txt"


def empty(text: Path) -> str:
    shutil.rmtree(text)
    return "removed: {text}/000.txt; removed: {text}/001.txt; removed: {text}/002.txt; and 17 more"


CHANGES: list[Callable[[Path], str]] = [edit, edit_in_place, add, remove, rename, empty]
every_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@every_change
def test_a_run_goes_on_with_its_own_corpus_whatever_became_of_the_text(place, whole, change):
    place.start(stop_at=3)
    what = change(place.text).format(text=place.text)
    listener = place.start()
    assert listener.steps == [3, 4, 5, 6]
    (said,) = [message for message in listener.stages if "changed since" in message]
    assert f"({what})" in said
    assert place.result() == whole
    assert len(place.corpora) == 1


@every_change
def test_without_its_corpus_a_run_refuses_another_text_and_changes_nothing(place, change):
    place.start(stop_at=3)
    (corpus,) = place.corpora
    shutil.rmtree(corpus)
    what = change(place.text).format(text=place.text)
    before = place.content()
    with pytest.raises(ConfigError) as raised:
        place.start()
    assert f"({what})" in str(raised.value)
    assert str(corpus) in str(raised.value)
    assert place.content() == before


def test_text_that_was_only_touched_is_the_same_text(place, whole):
    place.start(stop_at=3)
    shutil.rmtree(place.corpora[0])
    for file in place.text.iterdir():
        os.utime(file, ns=(1, 1))
    copied = place.folder / "copy"
    shutil.copytree(place.text, copied)
    shutil.rmtree(place.text)
    copied.rename(place.text)
    listener = place.start()
    assert not [message for message in listener.stages if "changed" in message]
    assert place.result() == whole


def test_a_run_that_has_no_checkpoint_takes_the_text_that_is_there(place):
    place.start(stop_at=1)
    edit(place.text)
    listener = place.start()
    assert listener.steps == list(range(1, STEPS + 1))
    changed = place.result()
    shutil.rmtree(place.run_folder)
    place.start()
    assert place.result() == changed


def test_a_run_folder_and_a_cache_may_move(place, whole, monkeypatch):
    place.start(stop_at=3)
    place.runs.rename(place.folder / "elsewhere")
    place.runs = place.folder / "elsewhere"
    monkeypatch.setenv("NEMOTRON3_CACHE", str(place.folder / "new cache"))
    edit(place.text)
    assert any("changed since" in message for message in place.start().stages)  # the old cache
    assert place.result() == whole


def test_a_moved_cache_is_found_under_its_new_name(place, whole, monkeypatch):
    place.start(stop_at=3)
    (place.folder / "cache").rename(place.folder / "new cache")
    monkeypatch.setenv("NEMOTRON3_CACHE", str(place.folder / "new cache"))
    edit(place.text)
    place.start()
    assert place.result() == whole


def test_two_runs_of_one_cache_keep_a_corpus_each(place, whole):
    place.start(stop_at=3)
    edit(place.text)
    place.start(stop_at=3, name="other")
    assert len(place.corpora) == 2
    place.start()
    assert place.result() == whole
    other = place.start(name="other")
    assert not [message for message in other.stages if "changed" in message]


@pytest.mark.parametrize("name", ["train/own-text.bin", "held_out/own-text.jsonl"])
def test_a_corpus_that_was_changed_is_named(place, whole, name):
    place.start(stop_at=3)
    file = place.corpora[0] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = place.content()
    with pytest.raises(DataError, match=rf"was changed \(edited: {name}\); delete it"):
        place.start()
    assert place.content() == before
    shutil.rmtree(place.corpora[0])
    place.start()
    assert place.result() == whole


def test_preparation_that_was_killed_leaves_nothing_to_stand_on(place, whole, monkeypatch):
    def killed(*_):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(preparation_module, "_put_in_place", killed)
        with pytest.raises(StoppedError):
            place.start()
    assert not place.run_folder.exists()
    edit_in_place(place.text)
    edit_in_place(place.text)  # back to what it was
    place.start()
    assert place.result() == whole


def test_a_tokenizer_that_prepared_text_was_cut_with_may_be_replaced(place):
    tokenizers = place.folder / "tokenizer"
    Tokenizer.train(["one two three four"] * 5, vocab_size=290).save(tokenizers)
    corpus = replace(place.run.corpus, tokenizer=LoadTokenizerConfig(path=str(tokenizers)))
    place.start(corpus=corpus)
    expected = place.result()
    shutil.rmtree(place.run_folder)
    place.start(stop_at=3, corpus=corpus)
    Tokenizer.train(["something else"] * 5, vocab_size=300).save(tokenizers)
    place.start(corpus=corpus)
    assert place.result() == expected


@pytest.fixture
def tokens(place):
    """A run on token files, stopped after a checkpoint."""
    prepared = prepare_corpus(place.run.corpus, directory=place.folder / "prepared")
    source = TokenizedSource(
        name="own-text",
        train=str(prepared.directory / "train" / "own-text"),
        held_out=str(prepared.directory / "held_out" / "own-text"),
    )
    tokenizer = LoadTokenizerConfig(path=str(prepared.directory / "tokenizer"))
    place.run = replace(place.run, corpus=TokenizedConfig(sources=(source,), tokenizer=tokenizer))
    place.start(stop_at=3)
    return place


def other_token(folder: Path) -> str:
    file = folder / "train" / "own-text.bin"
    content = bytearray(file.read_bytes())
    content[40] ^= 1
    file.write_bytes(content)
    return f"edited: {file}"


def other_index(folder: Path) -> str:
    file = folder / "held_out" / "own-text.idx"
    file.write_bytes(file.read_bytes() + b"\0")
    return f"edited: {file}"


def no_index(folder: Path) -> str:
    file = folder / "held_out" / "own-text.idx"
    file.unlink()
    return f"removed: {file}"


def other_tokenizer(folder: Path) -> str:
    Tokenizer.train(["something else"] * 5, vocab_size=320).save(folder / "tokenizer")
    return f"another tokenizer: {folder / 'tokenizer'}"


def no_tokenizer(folder: Path) -> str:
    shutil.rmtree(folder / "tokenizer")
    return f"another tokenizer: {folder / 'tokenizer'}"


@pytest.mark.parametrize(
    "change", [other_token, other_index, no_index, other_tokenizer, no_tokenizer]
)
def test_token_files_that_changed_are_refused_by_name(tokens, change):
    what = change(tokens.folder / "prepared")
    before = tokens.content()
    with pytest.raises(ConfigError) as raised:
        tokens.start()
    assert f"trained on other data ({what})" in str(raised.value)
    assert tokens.content() == before


def test_token_files_that_were_touched_go_on(tokens, whole):
    for file in (tokens.folder / "prepared" / "train").iterdir():
        os.utime(file, ns=(1, 1))
    tokens.start()
    assert tokens.result() == whole


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CORPUS_FORMAT", "a prepared corpus has format 99, was"),
        ("ORDER_FORMAT", "the order of batches has format 99, was"),
    ],
)
def test_another_version_of_the_package_is_refused(place, monkeypatch, name, message):
    place.start(stop_at=3)
    before = place.content()
    monkeypatch.setattr(inputs, name, 99)
    with pytest.raises(ConfigError, match=f"another version of this package .{message}"):
        place.start()
    assert place.content() == before


def test_a_corpus_that_comes_out_otherwise_is_refused(place, monkeypatch):
    """As it does when another version of the library learns another vocabulary."""
    place.start(stop_at=3)
    shutil.rmtree(place.corpora[0])
    real = preparation_module.Tokenizer.train.__func__

    def train(cls, documents, **options):
        return real(cls, (text.swapcase() for text in documents), **options)

    monkeypatch.setattr(preparation_module.Tokenizer, "train", classmethod(train))
    before = place.content()
    with pytest.raises(ConfigError, match=r"comes out otherwise .*tokenizers .* then"):
        place.start()
    assert place.content() == before


@pytest.mark.parametrize("content", [None, "{", '{"format": 7}', "[]"])
def test_checkpoints_without_a_record_of_their_data_are_refused(place, content):
    place.start(stop_at=3)
    file = place.run_folder / "inputs.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ConfigError, match=r"has checkpoints, but .*inputs\.json does not say"):
        place.start()


def test_a_blend_that_changed_is_refused_by_its_weight(place):
    other = replace(place.run, corpus=place.run.corpus)
    phases = (replace(other.phases[0], weights={"own-text": 1.0}),)
    place.start(stop_at=3, phases=phases)
    changed = (replace(other.phases[0], weights={"own-text": 2.0}),)
    with pytest.raises(ConfigError, match=r"first phases\[0\]\.weights\.own-text: 1\.0 there, 2"):
        place.start(phases=changed)
    baselines = with_leaf(replace(place.run, phases=phases), "baselines.order", 3)
    with pytest.raises(ConfigError, match=r"first baselines\.order: 2 there, 3 now"):
        pretrain(baselines, runs=place.runs)


def test_a_package_of_ready_made_text_that_changed_is_said(place, monkeypatch):
    source = PinnedConfig(name="networkx", max_bytes=30_000, accept_changed=True)
    corpus = replace(place.run.corpus, sources=(source,))
    place.start(stop_at=3, corpus=corpus)
    monkeypatch.setattr("nemotron3.data.text_sources.installed_version", lambda _: "99")
    listener = place.start(corpus=corpus)
    assert any("(another version: text of networkx)" in message for message in listener.stages)
    assert listener.steps[-1] == STEPS


def test_a_finished_run_is_shown_and_says_that_its_text_changed(place):
    place.start()
    add(place.text)
    before = place.content()
    listener = place.start()
    assert listener.steps == []
    assert f"(the data changed since: added: {place.text}/more.txt)" in listener.stages[0]
    (place.run_folder / "inputs.json").write_text("{")
    assert "inputs.json cannot be read" in place.start().stages[0]
    (place.run_folder / "inputs.json").unlink()
    assert place.start().stages == [f"{place.run_folder} is finished; this is what it showed"]
    before.pop("inputs.json")
    assert place.content() == before


def test_a_replay_goes_on_as_the_run_and_another_text_is_said(place, whole, capsys):
    place.start(stop_at=3)
    record = place.run_folder / "run.json"
    edit(place.text)
    assert main(["pretrain", "--from", str(record), "--runs", str(place.runs)]) == 0
    assert place.result() == whole
    assert "edited" in capsys.readouterr().out
    again = ["pretrain", "--from", str(record), "--runs", str(place.runs), "--name", "again"]
    assert main(again) == 0
    assert "(another text: own-text" in capsys.readouterr().out


def test_benchmarks_read_the_text_that_the_run_held_out(place):
    place.start()
    corpus = PreparedCorpus(place.corpora[0])
    edit(place.text)
    tokenizer, held_out = held_out_of(place.run_folder / "model")
    assert tokenizer.fingerprint == corpus.tokenizer.fingerprint
    assert (held_out["own-text"].tokens == corpus.held_out["own-text"].tokens).all()


def test_the_record_of_a_corpus_is_read_as_it_was_written(place):
    place.start(stop_at=3)
    record = json.loads((place.run_folder / "inputs.json").read_text())
    kept = from_record(inputs.RunInputs, record)
    assert kept.text == PreparedCorpus(place.corpora[0]).made_of.text
    assert kept.files.keys() == {
        str(file.relative_to(place.corpora[0]))
        for file in place.corpora[0].rglob("*/*")
        if file.is_file()
    }
    assert issubclass(ConfigError, Nemotron3Error)
