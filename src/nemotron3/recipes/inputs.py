"""The inputs of a run, recorded in its folder from the first checkpoint on.

Weights belong to the text, the order of batches and the tokenizer that they were trained with. So
a run records these in `inputs.json` before its first step, and when it resumes:

    prepared text      it continues with the corpus that it started with, even if the files of that
                       corpus changed, and reports the changes
    corpus is gone     it is prepared again where the text is unchanged, byte for byte
    token files        they are used in place, so a change is an error
    initial model      the same: what it says beside its weights goes into the result

An error names what changed, and is raised before anything in the run's folder is written. Without
a checkpoint nothing depends on the data yet, and the run starts again with the present data.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from nemotron3.checkpoint.store import saved_steps
from nemotron3.config import from_record, read_record, to_record, write_json
from nemotron3.data import (
    Corpus,
    CorpusConfig,
    PreparedCorpus,
    TokenizedConfig,
    open_tokenized,
    prepare_corpus,
)
from nemotron3.data.corpus import HELD_OUT, TOKENIZER, TRAIN, MadeOf
from nemotron3.data.fingerprint import FileState, file_changes, file_states, in_words
from nemotron3.data.loader import ORDER_FORMAT
from nemotron3.data.manifest import FORMAT as CORPUS_FORMAT
from nemotron3.data.preparation import Progress, cached_corpus, text_changes
from nemotron3.errors import ConfigError, DataError
from nemotron3.recipes.input_files import INPUTS_FILE, model_files
from nemotron3.text import Tokenizer

_FORMAT = 2
_WAY_OUT = "give this run another --name, or delete the folder to begin anew"


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """The data of a run as they were when it began."""

    format: int
    corpus_format: int
    """Of the package's preparation: what it makes of a text."""
    order_format: int
    """Of the package's loader: which rows a step has."""
    tokenizer: str
    """Fingerprint of the tokenizer."""
    tokenizers_version: str
    """Of the library that learns and cuts, for messages."""
    corpus_key: str | None
    """Of a prepared corpus; None where token files are used as they lie."""
    corpus_folder: str | None
    files: dict[str, FileState]
    """What is read in training, by paths below the prepared corpus or as configured."""
    text: dict[str, FileState]
    """The files that a prepared corpus was made of."""
    packages: dict[str, str]
    """Digest and version of ready-made text that it was made of."""
    model: dict[str, FileState]
    """The files of the model that the run began with; empty where weights were initial ones."""


def open_inputs(
    folder: Path,
    config: CorpusConfig | TokenizedConfig,
    *,
    init_from: str | None = None,
    say: Callable[[str], None],
    progress: Progress,
) -> tuple[Corpus, RunInputs]:
    """The data that the run in `folder` stands on, or those of a run that begins.

    `init_from` is the directory of the model that it begins with.
    """
    kept = _read(folder) if saved_steps(folder / "checkpoints") else None
    of_model = [] if init_from is None else model_files(init_from)
    if kept is not None:
        _require_formats(folder, kept)
        _require_same_model(folder, file_changes(kept.model, of_model))
    corpus: Corpus
    if isinstance(config, TokenizedConfig):
        if kept is not None:
            _require_unchanged(folder, _token_file_changes(kept, config))
        corpus = open_tokenized(config)
    elif kept is None:
        corpus = prepare_corpus(config, progress=progress)
    else:
        corpus = _own_corpus(folder, kept, config, say, progress)
    found = corpus.tokenizer.fingerprint
    if kept is not None and found != kept.tokenizer:
        _require_unchanged(folder, [f"the tokenizer is {found[:12]}, was {kept.tokenizer[:12]}"])
    return corpus, kept or _inputs_of(corpus, config, of_model)


def write_inputs(folder: Path, inputs: RunInputs) -> None:
    """Write the record into the run's folder, whole or not at all."""
    write_json(folder / INPUTS_FILE, inputs)


def changes_since(folder: Path, config: CorpusConfig | TokenizedConfig) -> list[str]:
    """What changed in the data of a run since it began, for a run that is finished."""
    if not (folder / INPUTS_FILE).is_file():
        return []
    try:
        kept = _read(folder)
    except ConfigError:
        return [f"{INPUTS_FILE} cannot be read"]
    if isinstance(config, TokenizedConfig):
        return _token_file_changes(kept, config)
    return text_changes(config, text=kept.text, packages=kept.packages)


def replay_differences(
    record: Path, config: CorpusConfig | TokenizedConfig, corpus: Corpus
) -> list[str]:
    """What the data of a replayed run have otherwise than its `run.json`, as far as it says."""
    recorded = read_record(record)
    manifest = recorded["extra"].get("corpus")
    if manifest is None or recorded["config"].get("corpus") != to_record(config):
        return []
    before = {source["name"]: source["sha256"] for source in manifest["sources"]}
    changes = [
        f"another text: {source.name}"
        for source in corpus.manifest.sources
        if before.get(source.name) != source.sha256
    ]
    if manifest["format"] != CORPUS_FORMAT:
        changes.append(f"format of the corpus: {CORPUS_FORMAT}, was {manifest['format']}")
    if manifest["tokenizer"] != corpus.tokenizer.fingerprint:
        changes.append("another tokenizer")
    return changes


def _own_corpus(
    folder: Path,
    kept: RunInputs,
    config: CorpusConfig,
    say: Callable[[str], None],
    progress: Progress,
) -> PreparedCorpus:
    changes = text_changes(config, text=kept.text, packages=kept.packages)
    assert kept.corpus_key is not None, "a run of text stands on a prepared corpus"
    place = cached_corpus(kept.corpus_key)
    recorded = Path(kept.corpus_folder or place)
    place = place if place.is_dir() or not recorded.is_dir() else recorded
    is_prepared = place.is_dir()
    if not is_prepared:
        if changes:
            raise ConfigError(
                f"{folder} has checkpoints of a text that is no longer there ({in_words(changes)}),"
                f" and its prepared corpus {place} is gone; put the text back, or {_WAY_OUT}"
            )
        place = prepare_corpus(config, progress=progress).directory
    elif changes:
        say(
            f"The text changed since the run began ({in_words(changes)}); it goes on with the "
            "corpus that it began with. For the new text, give another --name"
        )
    damage = file_changes(kept.files, _files_below(place), below=place)
    if damage and not is_prepared:
        raise ConfigError(
            f"{folder} has checkpoints of a corpus that comes out otherwise when it is prepared "
            f"again from the same text ({in_words(damage)}; tokenizers {kept.tokenizers_version} "
            f"then, {version('tokenizers')} now); install that version, or {_WAY_OUT}"
        )
    if damage:
        raise DataError(
            f"{place}, the corpus that {folder} was trained on, was changed ({in_words(damage)}); "
            "delete it, and it is prepared again from the text"
        )
    return PreparedCorpus(place)


def _require_formats(folder: Path, kept: RunInputs) -> None:
    changes = [
        f"{what} has format {now}, was {before}"
        for what, before, now in (
            ("a prepared corpus", kept.corpus_format, CORPUS_FORMAT),
            ("the order of batches", kept.order_format, ORDER_FORMAT),
        )
        if before != now
    ]
    if changes:
        raise ConfigError(
            f"{folder} has checkpoints of another version of this package ({in_words(changes)}); "
            f"go on with the revision that run.json names, or {_WAY_OUT}"
        )


def _require_unchanged(folder: Path, changes: list[str]) -> None:
    if changes:
        raise ConfigError(
            f"{folder} has checkpoints that were trained on other data ({in_words(changes)}); put "
            f"the data back, or {_WAY_OUT}"
        )


def _require_same_model(folder: Path, changes: list[str]) -> None:
    if changes:
        raise ConfigError(
            f"{folder} has checkpoints of a run that began with another model "
            f"({in_words(changes)}); put its files back, or {_WAY_OUT}"
        )


def _inputs_of(
    corpus: Corpus, config: CorpusConfig | TokenizedConfig, of_model: list[Path]
) -> RunInputs:
    made_of = MadeOf(text={}, packages={})
    place: Path | None = None
    if isinstance(corpus, PreparedCorpus):
        made_of, place = corpus.made_of, corpus.directory
    files = _files_below(place) if place is not None else _token_files(config)
    return RunInputs(
        format=_FORMAT,
        corpus_format=CORPUS_FORMAT,
        order_format=ORDER_FORMAT,
        tokenizer=corpus.tokenizer.fingerprint,
        tokenizers_version=version("tokenizers"),
        corpus_key=None if place is None else corpus.manifest.key,
        corpus_folder=None if place is None else str(place.resolve()),
        files=file_states(files, below=place),
        text=made_of.text,
        packages=made_of.packages,
        model=file_states(of_model),
    )


def _token_file_changes(kept: RunInputs, config: TokenizedConfig) -> list[str]:
    changes = file_changes(kept.files, (f for f in _token_files(config) if f.is_file()))
    tokenizer = config.tokenizer
    if tokenizer.kind == "load":
        try:
            found = Tokenizer.from_directory(tokenizer.path).fingerprint
        except DataError:
            found = None
        if found != kept.tokenizer:
            changes.append(f"another tokenizer: {tokenizer.path}")
    return changes


def _token_files(config: CorpusConfig | TokenizedConfig) -> list[Path]:
    assert isinstance(config, TokenizedConfig)
    return [
        Path(prefix + suffix)
        for source in config.sources
        for prefix in (source.train, source.held_out)
        for suffix in (".bin", ".idx")
    ]


def _files_below(place: Path) -> list[Path]:
    return sorted(
        file
        for part in (TRAIN, HELD_OUT, TOKENIZER)
        for file in (place / part).rglob("*")
        if file.is_file()
    )


def _read(folder: Path) -> RunInputs:
    file = folder / INPUTS_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.get("format") != _FORMAT:
            raise ConfigError(f"its format is {record.get('format')!r}, {_FORMAT} is read")
        return from_record(RunInputs, record)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{folder} has checkpoints, but {file} does not say what they were trained on "
            f"({error}); go on with the revision that run.json names, or {_WAY_OUT}"
        ) from error
