"""The record of a prepared corpus: sources, licences, sizes, and unusable rows.

It is written last, so a folder with a manifest is complete. A reader can find the text again from
the names, versions and digests in it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from nemotron3.config import from_record, to_record
from nemotron3.errors import ConfigError, DataError

MANIFEST_FILE = "manifest.json"
FORMAT = 2
"""Version of the format; increased when preparation writes another result for the same config."""


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """Size of one split of a source."""

    documents: int
    bytes: int
    """UTF-8 bytes of the documents."""
    tokens: int
    """Tokens, including the one that ends each document."""


@dataclass(frozen=True, kw_only=True)
class SourceManifest:
    """The record of one source."""

    name: str
    licence: str
    origin: str
    version: str
    sha256: str
    """Digest of the text: for a pinned source the one in `sources.py`, else of all documents."""
    train: SplitSize
    held_out: SplitSize
    bad_rows: dict[str, int]
    """Rows that could not be used, by reason."""
    first_bad_rows: dict[str, str]
    """Place of the first row with each reason."""
    skipped_files: dict[str, int]
    """Number of files in a directory that were skipped, by suffix."""

    @property
    def held_out_share(self) -> float:
        """Share of the text that is held out, in bytes."""
        return self.held_out.bytes / (self.train.bytes + self.held_out.bytes)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record of a prepared corpus."""

    format: int
    key: str
    """Digest of the config and of the files it refers to; the name of the folder in the cache."""
    vocab_size: int
    tokenizer: str
    """Fingerprint of the tokenizer."""
    held_out_fraction: float
    """The requested share; `held_out_share` is the actual one."""
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
        """Bytes of held-out text over all sources."""
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
