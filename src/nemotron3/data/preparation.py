"""Prepare a corpus: convert text to token files, once.

There are three passes over the text, so that no corpus has to fit in memory. *Survey* computes the
hash and size of every document and decides the split. *Learn* trains the tokenizer on a sample of
the training documents, never of held-out ones. *Encode* writes the token ids.

The folder is created under a temporary name and renamed when it is complete, so a preparation that
was killed never looks finished. In the cache its name is a digest of the config and of the source
files, so the same request is answered at once. Several processes may prepare the same corpus at the
same time: one result is kept, and the others are discarded.
"""

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from nemotron3.config import to_record
from nemotron3.data.corpus import (
    HELD_OUT,
    MADE_OF,
    TOKENIZER,
    TRAIN,
    CorpusConfig,
    LoadTokenizerConfig,
    MadeOf,
    PreparedCorpus,
    TekkenTokenizerConfig,
    TrainTokenizerConfig,
)
from nemotron3.data.documents import Document, FilesConfig, ReadReport, find_files
from nemotron3.data.fingerprint import FileState, file_changes, file_states
from nemotron3.data.manifest import FORMAT, MANIFEST_FILE, Manifest, SourceManifest, SplitSize
from nemotron3.data.package_archives import cache_directory
from nemotron3.data.sources import PinnedConfig
from nemotron3.data.splits import (
    Selection,
    Survey,
    cap_document,
    cut_document,
    document_key,
    select,
)
from nemotron3.data.text_sources import (
    TextSource,
    open_source,
    package_identity,
    source_identity,
)
from nemotron3.data.token_files import TokenFileWriter
from nemotron3.errors import ConfigError, DataError, DependencyMissingError, StorageError
from nemotron3.text import Tokenizer
from nemotron3.text.tekken import tekken_tokenizer

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with the stage, the bytes of text done, and the total bytes (0 while unknown)."""

_BATCH_BYTES = 1 << 21
_STALE_S = 24 * 3600


def prepare_corpus(
    config: CorpusConfig,
    *,
    directory: str | Path | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> PreparedCorpus:
    """Open the prepared corpus of a config, or prepare it if it does not exist.

    `directory` is its folder, by default one in the cache (`package_archives.cache_directory`).
    """
    cache_folder = Path(cache) if cache is not None else cache_directory()
    key = corpus_key(config)
    folder = Path(directory) if directory is not None else cached_corpus(key, cache=cache_folder)
    if (folder / MANIFEST_FILE).is_file():
        prepared = PreparedCorpus(folder)
        if prepared.manifest.key != key:
            raise ConfigError(
                f"{folder} holds a corpus of another config, version or state of the files; "
                f"delete it or give another directory"
            )
        return prepared
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and no prepared corpus; give another directory")
    sources = [open_source(source, cache=cache_folder) for source in config.sources]
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        _remove_stale(temporary)
        _prepare(config, key, sources, temporary, progress or _no_progress)
        _put_in_place(temporary, folder)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{folder} could not be written ({error}); free space, or set NEMOTRON3_CACHE to a "
            f"folder that can be written to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return PreparedCorpus(folder)


def cached_corpus(key: str, *, cache: Path | None = None) -> Path:
    """The folder of the corpus with this key in the cache; it may not exist."""
    return (cache or cache_directory()) / "corpora" / key[:16]


def text_changes(
    config: CorpusConfig, *, text: Mapping[str, FileState], packages: Mapping[str, str]
) -> list[str]:
    """The differences from the files and packages of a corpus, each in a few words."""
    changes: list[str] = []
    files: dict[Path, None] = {}
    for source in config.sources:
        match source:
            case FilesConfig():
                # If the folder was deleted, all its files are reported as removed.
                with suppress(DataError):
                    files.update(dict.fromkeys(find_files(source.path)))
            case PinnedConfig():
                try:
                    now = package_identity(source)
                except DependencyMissingError:
                    now = "not installed"
                if packages.get(source.name) != now:
                    changes.append(f"another version: text of {source.name}")
    return file_changes(text, files) + changes


def corpus_key(config: CorpusConfig) -> str:
    """Digest of a config and of the files and packages that it refers to."""
    identity = {
        "format": FORMAT,
        "config": to_record(config),
        "sources": [source_identity(source) for source in config.sources],
        "tokenizer": _tokenizer_identity(config),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _tokenizer_identity(config: CorpusConfig) -> str:
    match config.tokenizer:
        case TrainTokenizerConfig() | TekkenTokenizerConfig():
            return version("tokenizers")  # the library that trains and applies it
        case LoadTokenizerConfig(path=path):
            return Tokenizer.from_directory(path).fingerprint


class _TextDigest:
    """SHA-256 over documents in the order they are read, each with its length in front."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, document: Document) -> int:
        """Add a document; returns its size in bytes."""
        raw = document.text.encode()
        self._hash.update(len(raw).to_bytes(8, "little"))
        self._hash.update(raw)
        return len(raw)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@dataclass(kw_only=True)
class _Surveyed:
    """A source with its split."""

    source: TextSource
    report: ReadReport
    sha256: str
    total_bytes: int
    selection: Selection
    is_single: bool
    """Whether the source is a single document, which `max_bytes` may cut; copies are skipped."""

    def documents(self) -> Iterator[tuple[str, Document, bool]]:
        """Each document with its split and whether the tokenizer learns from it."""
        digest = _TextDigest()
        for number, document in enumerate(self.source.documents(ReadReport())):
            digest.add(document)
            if self.is_single:
                if number:
                    continue
                document = _capped(self.source, document)
            key = document_key(document.text)
            if not self.selection.takes(key):
                continue
            if cut := self.selection.cut_bytes(key):
                yield from self._cut(document, cut, is_sampled=self.selection.samples(key))
            else:
                split = HELD_OUT if self.selection.holds_out(key) else TRAIN
                yield split, document, self.selection.samples(key)
        if digest.hexdigest() != self.sha256:
            raise DataError(f"{self.source.origin} changed while it was read; prepare it again")

    def _cut(
        self, document: Document, held_out_bytes: int, *, is_sampled: bool
    ) -> Iterator[tuple[str, Document, bool]]:
        front, end = cut_document(document.text, held_out_bytes)
        if not front or not end:
            raise DataError(
                f"{document.source} has {len(document.text)} characters, too few to hold a part "
                f"out; give more text"
            )
        yield TRAIN, Document(text=front, source=document.source), is_sampled
        yield HELD_OUT, Document(text=end, source=document.source), False


def _capped(source: TextSource, document: Document) -> Document:
    if source.max_bytes is None:
        return document
    text = cap_document(document.text, source.max_bytes)
    return Document(text=text, source=document.source)


def _prepare(
    config: CorpusConfig,
    key: str,
    sources: Sequence[TextSource],
    folder: Path,
    progress: Progress,
) -> None:
    made_of = _made_of(config)
    surveyed = _survey(config, sources, progress)
    tokenizer = _make_tokenizer(config, surveyed, progress)
    tokenizer.save(folder / TOKENIZER)
    # The fingerprint must be that of the tokenizer as it will be loaded.
    tokenizer = Tokenizer.from_directory(folder / TOKENIZER)
    total = sum(one.total_bytes for one in surveyed)
    done = 0
    manifests: list[SourceManifest] = []
    for one in surveyed:
        writer = _SplitWriters(folder, one.source.name, tokenizer)
        with writer:
            for split, document, _ in one.documents():
                writer.add(split, document)
                if writer.has_flushed:
                    progress("encode", done + writer.bytes_written, total)
        done += writer.bytes_written
        progress("encode", done, total)
        manifests.append(_source_manifest(one, writer.sizes))
    content = json.dumps(to_record(made_of), indent=1, ensure_ascii=False)
    (folder / MADE_OF).write_text(content + "\n", encoding="utf-8")
    Manifest(
        format=FORMAT,
        key=key,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        held_out_fraction=config.held_out_fraction,
        sources=tuple(manifests),
    ).write(folder)


def _made_of(config: CorpusConfig) -> MadeOf:
    files = [s for s in config.sources if isinstance(s, FilesConfig)]
    pinned = [s for s in config.sources if isinstance(s, PinnedConfig)]
    return MadeOf(
        text=file_states(file for source in files for file in find_files(source.path)),
        packages={source.name: package_identity(source) for source in pinned},
    )


def _survey(
    config: CorpusConfig, sources: Sequence[TextSource], progress: Progress
) -> list[_Surveyed]:
    read: list[tuple[TextSource, ReadReport, str, Survey, bool]] = []
    done = 0
    for source in sources:
        report, survey, digest = ReadReport(), Survey(), _TextDigest()
        first: Document | None = None
        for document in source.documents(report):
            first = first or document
            size = digest.add(document)
            survey.add(document_key(document.text), size)
            done += size
        progress("survey", done, 0)
        if report.bad:
            # Bad rows of pinned text are known (empty __init__.py); those of user text are not.
            level = logging.WARNING if source.sha256 is None else logging.INFO
            logger.log(level, "%s: left out %s", source.name, report.summary())
        is_single = survey.num_distinct == 1
        if is_single and first is not None:
            survey, first = Survey(), _capped(source, first)
            survey.add(document_key(first.text), len(first.text.encode()))
        read.append((source, report, digest.hexdigest(), survey, is_single))
    caps = [None if is_single else source.max_bytes for source, _, _, _, is_single in read]
    surveys = [survey for _, _, _, survey, _ in read]
    wanted = [
        min(cap or survey.total_bytes, survey.total_bytes)
        for cap, survey in zip(caps, surveys, strict=True)
    ]
    sample_fraction = 1.0
    if isinstance(config.tokenizer, TrainTokenizerConfig):
        sample_fraction = min(1.0, config.tokenizer.sample_bytes / sum(wanted))
    selections = select(
        surveys,
        max_bytes=caps,
        held_out_fraction=config.held_out_fraction,
        sample_fraction=sample_fraction,
    )
    return [
        _Surveyed(
            source=source,
            report=report,
            sha256=digest,
            total_bytes=total_bytes,
            selection=selection,
            is_single=is_single,
        )
        for (source, report, digest, _, is_single), total_bytes, selection in zip(
            read, wanted, selections, strict=True
        )
    ]


def _make_tokenizer(
    config: CorpusConfig, surveyed: Sequence[_Surveyed], progress: Progress
) -> Tokenizer:
    match config.tokenizer:
        case LoadTokenizerConfig(path=path):
            return Tokenizer.from_directory(path)
        case TekkenTokenizerConfig():
            return tekken_tokenizer()
        case TrainTokenizerConfig() as wanted:
            progress("learn", 0, 0)
            return Tokenizer.train(
                (
                    document.text
                    for one in surveyed
                    for _, document, is_sampled in one.documents()
                    if is_sampled
                ),
                vocab_size=wanted.vocab_size,
                num_special_tokens=wanted.num_special_tokens,
                words=wanted.words,
            )


@dataclass
class _Count:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass
class _SplitWriters:
    """Writes both splits of one source, in batches that the tokenizer encodes in parallel."""

    folder: Path
    name: str
    tokenizer: Tokenizer
    bytes_written: int = 0
    has_flushed: bool = False
    _counts: dict[str, _Count] = field(
        default_factory=lambda: {TRAIN: _Count(), HELD_OUT: _Count()}
    )
    _waiting: list[tuple[str, str]] = field(default_factory=list)
    _waiting_bytes: int = 0
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "_SplitWriters":
        vocab_size = self.tokenizer.vocab_size
        self._files = {
            split: self._stack.enter_context(
                TokenFileWriter(self.folder / split / self.name, vocab_size=vocab_size)
            )
            for split in (TRAIN, HELD_OUT)
        }
        text_file = self.folder / HELD_OUT / f"{self.name}.jsonl"
        self._held_out_text = self._stack.enter_context(text_file.open("w", encoding="utf-8"))
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._stack.__exit__(*error)  # pyright: ignore[reportArgumentType]

    @property
    def sizes(self) -> dict[str, SplitSize]:
        return {
            split: SplitSize(documents=c.documents, bytes=c.bytes, tokens=c.tokens)
            for split, c in self._counts.items()
        }

    def add(self, split: str, document: Document) -> None:
        size = len(document.text.encode())
        self._counts[split].documents += 1
        self._counts[split].bytes += size
        self._waiting.append((split, document.text))
        self._waiting_bytes += size
        if split == HELD_OUT:
            row = {"text": document.text, "source": document.source}
            self._held_out_text.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.has_flushed = self._waiting_bytes >= _BATCH_BYTES
        if self.has_flushed:
            self._flush()

    def _flush(self) -> None:
        texts = [text for _, text in self._waiting]
        encoded = self.tokenizer.encode_batch(texts, parse_special=False)
        for (split, _), ids in zip(self._waiting, encoded, strict=True):
            ids.append(self.tokenizer.eos_id)
            self._files[split].add(ids)
            self._counts[split].tokens += len(ids)
        self.bytes_written += self._waiting_bytes
        self._waiting.clear()
        self._waiting_bytes = 0


def _source_manifest(one: _Surveyed, sizes: dict[str, SplitSize]) -> SourceManifest:
    return SourceManifest(
        name=one.source.name,
        licence=one.source.licence,
        origin=one.source.origin,
        version=one.source.version,
        sha256=one.source.sha256 or one.sha256,
        train=sizes[TRAIN],
        held_out=sizes[HELD_OUT],
        bad_rows={str(reason): count for reason, count in one.report.bad.items()},
        first_bad_rows={str(reason): place for reason, place in one.report.first_bad.items()},
        skipped_files=dict(one.report.skipped_files),
    )


def _put_in_place(temporary: Path, folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    try:
        temporary.rename(folder)
    except OSError:
        # Another process was faster, and its corpus is the same.
        if not (folder / MANIFEST_FILE).is_file():
            raise


def _remove_stale(temporary: Path) -> None:
    """Remove temporary folders of killed preparations of this corpus, a day old or more."""
    stem = temporary.name.rsplit(".", 2)[0]
    for folder in temporary.parent.glob(f"{stem}.*.tmp"):
        if folder != temporary and time.time() - folder.stat().st_mtime > _STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def _no_progress(stage: str, done: int, total: int) -> None:
    del stage, done, total
