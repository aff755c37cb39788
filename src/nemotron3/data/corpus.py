"""A corpus: its sources, its tokenizer, its split, and the folder of its prepared form.

`preparation.prepare_corpus` turns a `CorpusConfig` into a folder, which `PreparedCorpus` reads:

    manifest.json              sources, licences and sizes
    made_of.json               the files and packages that it was made of
    tokenizer/                 tokenizer.json and its companions
    train/NAME.bin, .idx       a token file for each source
    held_out/NAME.bin, .idx
    held_out/NAME.jsonl        the held-out text itself, for baselines and for reading

A document is its token ids followed by `</s>`; special tokens written in a document are text.

`tokenized.py` provides the same interface for text that is already tokenized.

    corpus = prepare_corpus(shakespeare_and_python())
    corpus.train["shakespeare"].num_tokens
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from nemotron3.config import from_record
from nemotron3.data.documents import Document
from nemotron3.data.fingerprint import FileState
from nemotron3.data.manifest import Manifest
from nemotron3.data.sources import PinnedConfig
from nemotron3.data.text_sources import SourceConfig
from nemotron3.data.token_files import TokenFile
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import Tokenizer

TRAIN = "train"
HELD_OUT = "held_out"
TOKENIZER = "tokenizer"
MADE_OF = "made_of.json"


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig:
    """Learn a byte-level BPE from the corpus."""

    kind: Literal["train"] = "train"

    vocab_size: int = 4096
    """Entries, special tokens included."""

    num_special_tokens: int = 32
    """Ids kept for special tokens: 32 for small vocabularies, 1000 as published."""

    words: tuple[str, ...] = ()
    """Words that become one entry each for any text, such as the chat template's `CHAT_WORDS`."""

    sample_bytes: int = 16_000_000
    """Bytes of training text to learn from, drawn evenly from all sources."""

    def __post_init__(self) -> None:
        if self.vocab_size <= 0 or self.sample_bytes <= 0:
            raise ConfigError(
                f"vocab_size = {self.vocab_size}, sample_bytes = {self.sample_bytes}: "
                f"both must be positive"
            )


@dataclass(frozen=True, kw_only=True)
class LoadTokenizerConfig:
    """Use the tokenizer of a model directory."""

    kind: Literal["load"] = "load"

    path: str
    """A directory with tokenizer.json."""


@dataclass(frozen=True, kw_only=True)
class TekkenTokenizerConfig:
    """Use the family's vocabulary of 131,072 entries, built from mistral-common."""

    kind: Literal["tekken"] = "tekken"


TokenizerConfig = TrainTokenizerConfig | LoadTokenizerConfig | TekkenTokenizerConfig


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Sources, split and vocabulary of a corpus."""

    kind: Literal["text"] = "text"

    sources: tuple[SourceConfig, ...]
    """The sources of text, each with a different name."""

    tokenizer: TokenizerConfig = field(default_factory=TrainTokenizerConfig)
    """The vocabulary."""

    held_out_fraction: float = 0.05
    """Share of the bytes of each source that is never trained on."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ConfigError("sources is empty: name at least one source of text")
        if len(set(names)) < len(names):
            raise ConfigError(f"sources are called {names}: each needs a name of its own")
        if not 0 < self.held_out_fraction < 1:
            raise ConfigError(f"held_out_fraction = {self.held_out_fraction}: it lies in (0, 1)")


def shakespeare_and_python(*, tokenizer: TokenizerConfig | None = None) -> CorpusConfig:
    """The default corpus, about 12 MB of English and Python, which needs only pip."""
    return CorpusConfig(
        sources=(
            PinnedConfig(name="shakespeare"),
            PinnedConfig(name="sympy", max_bytes=4_000_000),
            PinnedConfig(name="networkx", max_bytes=3_000_000),
        ),
        tokenizer=tokenizer or TrainTokenizerConfig(),
    )


def english_and_code(*, tokenizer: TokenizerConfig | None = None) -> CorpusConfig:
    """The larger corpus, about 78 MB, which needs Debian's and npm's package tools."""
    return CorpusConfig(
        sources=tuple(
            PinnedConfig(name=name)
            for name in (
                "shakespeare",
                "state-of-the-union",
                "python-docs",
                "perl-docs",
                "sympy",
                "networkx",
                "go",
            )
        ),
        tokenizer=tokenizer or TrainTokenizerConfig(vocab_size=16_384),
        held_out_fraction=0.02,
    )


@dataclass(frozen=True, kw_only=True)
class MadeOf:
    """The files and packages that a prepared corpus was made of."""

    text: dict[str, FileState]
    """The files of `FilesConfig` sources, by their paths."""
    packages: dict[str, str]
    """Digest and version of each `PinnedConfig` source."""


class Corpus:
    """Tokenized text, split into training and held-out text."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer,
        *,
        train: Mapping[str, TokenFile],
        held_out: Mapping[str, TokenFile],
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.train = train
        self.held_out = held_out

    @property
    def names(self) -> tuple[str, ...]:
        """The sources, in the order of the config."""
        return tuple(source.name for source in self.manifest.sources)

    def held_out_documents(self, name: str) -> Iterator[Document]:
        """The held-out documents of a source as text."""
        self.manifest.source(name)
        file = self.held_out[name]
        for index in range(len(file)):
            ids = file.document(index).tolist()
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            yield Document(text=text, source=f"{file.prefix}, document {index}")

    def train_text(self, name: str, *, max_bytes: int) -> list[str]:
        """About `max_bytes` of a source's training text: evenly drawn documents, decoded."""
        self.manifest.source(name)
        file = self.train[name]
        texts: list[str] = []
        left = max_bytes
        for index in np.random.default_rng(0).permutation(len(file)):
            if left <= 0:
                break
            # A token has at least one byte, so at most as many tokens as bytes are needed.
            ids = file.document(int(index))[: left + 1].tolist()
            texts.append(self.tokenizer.decode(ids, skip_special_tokens=True))
            left -= len(texts[-1].encode())
        return texts

    def train_sample(self, *, max_bytes: int) -> list[str]:
        """About `max_bytes` of all sources in proportion to their sizes, shuffled."""
        total = sum(source.train.bytes for source in self.manifest.sources)
        share = min(1.0, max_bytes / total)
        texts = [
            text
            for source in self.manifest.sources
            for text in self.train_text(source.name, max_bytes=int(share * source.train.bytes))
        ]
        return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


class PreparedCorpus(Corpus):
    """A corpus that was prepared from text, opened from its folder."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        manifest = Manifest.read(self.directory)
        train, held_out = self._open(manifest, TRAIN), self._open(manifest, HELD_OUT)
        tokenizer = Tokenizer.from_directory(self.directory / TOKENIZER)
        if tokenizer.fingerprint != manifest.tokenizer:
            raise DataError(
                f"{self.directory / TOKENIZER} is not the tokenizer that made the ids; "
                f"delete {self.directory} and prepare the corpus again"
            )
        super().__init__(manifest, tokenizer, train=train, held_out=held_out)

    @property
    def made_of(self) -> MadeOf:
        """The files and packages that the corpus was made of."""
        return from_record(MadeOf, json.loads((self.directory / MADE_OF).read_text("utf-8")))

    def held_out_documents(self, name: str) -> Iterator[Document]:
        """The held-out documents of a source as text."""
        self.manifest.source(name)
        with (self.directory / HELD_OUT / f"{name}.jsonl").open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                yield Document(text=row["text"], source=row["source"])

    def _open(self, manifest: Manifest, split: str) -> Mapping[str, TokenFile]:
        files: dict[str, TokenFile] = {}
        for source in manifest.sources:
            file = files[source.name] = TokenFile(self.directory / split / source.name)
            size = source.train if split == TRAIN else source.held_out
            if (len(file), file.num_tokens) != (size.documents, size.tokens):
                raise DataError(
                    f"{file.bin_path} has {file.num_tokens} tokens, the manifest tells of "
                    f"{size.tokens}: delete {self.directory} and prepare the corpus again"
                )
        return files
