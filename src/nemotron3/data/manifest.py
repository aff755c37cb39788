"""The record of a prepared corpus: sources, licences, sizes, and unusable rows.

It is written last, so a folder with a manifest is whole. It travels with the model: `run.json` can
quote it, and a reader can find the text again from names, versions and digests.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from nemotron3.config import from_record, to_record
from nemotron3.errors import ConfigError, DataError

MANIFEST_FILE = "manifest.json"
FORMAT = 2
"""Raised whenever preparation writes something else for the same config."""


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """How much text a split of a source has."""

    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """Tokens, the one that ends each document included."""


@dataclass(frozen=True, kw_only=True)
class SourceManifest:
    """One source as it was used."""

    name: str
    licence: str
    origin: str
    version: str
    sha256: str
    """Digest of the text: of a pinned source as `sources.py` states it, else of all documents."""
    train: SplitSize
    held_out: SplitSize
    bad_rows: dict[str, int]
    """Rows that could not be used, by reason."""
    first_bad_rows: dict[str, str]
    """Where each reason was met first."""
    skipped_files: dict[str, int]
    """Files of a directory that were not read, by suffix."""

    @property
    def held_out_share(self) -> float:
        """Share of the text that is held out, in bytes."""
        return self.held_out.bytes / (self.train.bytes + self.held_out.bytes)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A prepared corpus."""

    format: int
    key: str
    """Digest of the config and of what it points at; the name of the folder in the cache."""
    vocab_size: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    held_out_fraction: float
    """The share that was wanted; `held_out_share` is the one that was met."""
    sources: tuple[SourceManifest, ...]

    def source(self, name: str) -> SourceManifest:
        """The source of that name."""
        for source in self.sources:
            if source.name == name:
                return source
        names = ", ".join(source.name for source in self.sources)
        raise ConfigError(f"source {name!r} is none of {names}")

    @property
    def held_out_bytes(self) -> int:
        """Bytes of text that is held out, over all sources."""
        return sum(source.held_out.bytes for source in self.sources)

    @property
    def held_out_share(self) -> float:
        """Share of the text that is held out, in bytes."""
        return self.held_out_bytes / (
            self.held_out_bytes + sum(source.train.bytes for source in self.sources)
        )

    def write(self, directory: Path) -> None:
        """Write the manifest into a folder."""
        content = json.dumps(to_record(self), indent=2, ensure_ascii=False)
        (directory / MANIFEST_FILE).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read the manifest of a folder."""
        file = directory / MANIFEST_FILE
        if not file.is_file():
            raise DataError(f"{directory} holds no {MANIFEST_FILE}: it is no prepared corpus")
        try:
            return from_record(cls, json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, ConfigError) as error:
            raise DataError(f"{file} cannot be read ({error}); delete {directory}") from error
