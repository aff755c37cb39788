"""One interface for all kinds of sources: a name, a licence, and documents.

Preparation reads a source three times (see `preparation.py`), so a source is not a stream of
documents but a function that starts one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nemotron3.data.documents import (
    BadRow,
    Document,
    FilesConfig,
    ReadReport,
    find_files,
    read_documents,
)
from nemotron3.data.package_archives import PackageText, PythonPackage, installed_version
from nemotron3.data.sources import CorpusSource, PinnedConfig, find_source, read_source

SourceConfig = PinnedConfig | FilesConfig


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """A source that is ready to be read."""

    name: str
    licence: str
    origin: str
    version: str
    sha256: str | None
    """The pinned digest; None where the text is the user's own."""
    max_bytes: int | None
    documents: Callable[[ReadReport], Iterator[Document]]
    """Reads the documents from the beginning and updates the report."""


def open_source(config: SourceConfig, *, cache: Path) -> TextSource:
    """Open the text of a source; a package that is not in the cache is downloaded."""
    match config:
        case PinnedConfig():
            return _open_pinned(config, find_source(config.name), cache)
        case FilesConfig():
            return TextSource(
                name=config.name,
                licence=config.licence,
                origin=config.path,
                version="",
                sha256=None,
                max_bytes=config.max_bytes,
                documents=lambda report: read_documents(config, report),
            )


def source_identity(config: SourceConfig) -> list[str]:
    """What a source's text depends on besides its config: digests, or files, sizes and times."""
    match config:
        case PinnedConfig():
            return [package_identity(config)]
        case FilesConfig():
            found = [(file.resolve(), file.stat()) for file in find_files(config.path)]
            return [
                f"{file} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
                for file, stat in found
            ]


def package_identity(config: PinnedConfig) -> str:
    """The digest of a ready-made text, and the package's version if any text is accepted."""
    source = find_source(config.name)
    if config.accept_changed and isinstance(source.origin, PythonPackage):
        return f"{source.sha256} {installed_version(source.origin.package)}"
    return source.sha256


def _open_pinned(config: PinnedConfig, source: CorpusSource, cache: Path) -> TextSource:
    text = read_source(source, accept_changed=config.accept_changed, cache=cache)
    return TextSource(
        name=source.name,
        licence=source.licence,
        origin=source.origin.label,
        version=text.version,
        sha256=source.sha256 if not config.accept_changed else None,
        max_bytes=config.max_bytes,
        documents=lambda report: _package_documents(text, report),
    )


def _package_documents(text: PackageText, report: ReadReport) -> Iterator[Document]:
    for path, raw in text.files.items():
        try:
            content = raw.decode()
        except UnicodeDecodeError as error:
            report.add_bad(BadRow.NOT_UTF8, f"{path}, byte {error.start}")
            continue
        if not content.strip():
            report.add_bad(BadRow.EMPTY, path)
            continue
        report.documents += 1
        yield Document(text=content, source=path)
