"""A corpus that is tokenized already: Megatron's .bin / .idx files, used in place.

Tokenizing terabytes again would be too expensive. The files are memory-mapped, not copied. The user
provides held-out text as a separate file and must make sure that no document is in both. The
tokenizer is still needed: for the size of the vocabulary, for bits per byte, and to show text.

    config = TokenizedConfig(
        sources=(TokenizedSource(name="web", train="web_train", held_out="web_valid"),),
        tokenizer=TekkenTokenizerConfig(),
    )
    corpus = open_tokenized(config)
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nemotron3.config import to_record
from nemotron3.data.corpus import Corpus, LoadTokenizerConfig, TekkenTokenizerConfig
from nemotron3.data.manifest import FORMAT, Manifest, SourceManifest, SplitSize
from nemotron3.data.token_files import TokenFile
from nemotron3.errors import ConfigError, DataError
from nemotron3.text import Tokenizer
from nemotron3.text.tekken import tekken_tokenizer

_CHUNK_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenizedSource:
    """A pair of token files of one kind of text."""

    name: str
    """Name of the source in the blend, the manifest and the metrics."""

    train: str
    """Path of the token file to train on, without .bin or .idx."""

    held_out: str
    """Path of the held-out token file, without .bin or .idx."""

    licence: str = "unstated"
    """Licence of the text, for the manifest."""


@dataclass(frozen=True, kw_only=True)
class TokenizedConfig:
    """Token files in place of text."""

    kind: Literal["tokens"] = "tokens"

    sources: tuple[TokenizedSource, ...]
    """The token files, each source with a different name."""

    tokenizer: LoadTokenizerConfig | TekkenTokenizerConfig
    """The vocabulary that the files were made with."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"sources are called {names}: at least one, each by its own name")


def open_tokenized(config: TokenizedConfig) -> Corpus:
    """Open the token files of a config. Every id is read once, to count and check it."""
    match config.tokenizer:
        case LoadTokenizerConfig(path=path):
            tokenizer = Tokenizer.from_directory(path)
        case TekkenTokenizerConfig():
            tokenizer = tekken_tokenizer()
    train = {source.name: TokenFile(source.train) for source in config.sources}
    held_out = {source.name: TokenFile(source.held_out) for source in config.sources}
    manifest = Manifest(
        format=FORMAT,
        key=hashlib.sha256(repr(to_record(config)).encode()).hexdigest(),
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer.fingerprint,
        held_out_fraction=0.0,
        sources=tuple(
            SourceManifest(
                name=source.name,
                licence=source.licence,
                origin=source.train,
                version="",
                sha256="",
                train=_measure(train[source.name], tokenizer),
                held_out=_measure(held_out[source.name], tokenizer),
                bad_rows={},
                first_bad_rows={},
                skipped_files={},
            )
            for source in config.sources
        ),
    )
    return Corpus(manifest, tokenizer, train=train, held_out=held_out)


def _measure(file: TokenFile, tokenizer: Tokenizer) -> SplitSize:
    token_bytes = np.array(tokenizer.byte_lengths())
    total = 0
    for start in range(0, file.num_tokens, _CHUNK_TOKENS):
        tokens = file.tokens[start : start + _CHUNK_TOKENS]
        largest = int(tokens.max())
        if largest >= len(token_bytes):
            raise DataError(
                f"{file.bin_path} holds token {largest}, but the tokenizer has "
                f"{len(token_bytes)} entries; name the tokenizer that made the file"
            )
        total += int(token_bytes[tokens].sum())
    if file.num_documents == 0:
        raise DataError(f"{file.bin_path} holds no documents; give a file with text in it")
    if total == 0:
        raise DataError(f"{file.bin_path} holds special tokens alone; give a file with text in it")
    return SplitSize(documents=file.num_documents, bytes=total, tokens=file.num_tokens)
