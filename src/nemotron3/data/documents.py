"""A user's own text, one document at a time: plain files, JSON lines, Parquet.

Real files contain unusable rows. They are counted by reason, with the place of the first one, and
reading continues. If more than `max_bad_fraction` of the rows are bad, the file is probably not
what the user thinks it is (a wrong column, a wrong encoding), and reading ends in an error that
names the reasons. A single plain file is one row, so there the first bad byte is an error.

Text is not changed: it is neither stripped nor normalised, and line ends are kept; only a byte
order mark is removed. The order is that of sorted paths, then rows, so a corpus is always read in
the same order.

    report = ReadReport()
    for document in read_documents(FilesConfig(path="notes/"), report):
        ...
    report.bad  # {BadRow.NOT_UTF8: 2}
"""

import glob
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from io import BufferedIOBase
from pathlib import Path
from typing import Literal

from nemotron3.data.parquet import parquet_rows
from nemotron3.errors import ConfigError, DataError

# fmt: off
TEXT_SUFFIXES = (
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".csv", ".tsv", ".py",
    ".pyi", ".ipynb", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java",
    ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".rb", ".pl", ".pm", ".pod", ".php", ".sh",
    ".bash", ".sql", ".r", ".jl", ".lua", ".hs", ".ml", ".swift", ".m", ".f90", ".toml",
    ".yaml", ".yml", ".ini", ".cfg", ".json", ".css",
)
# fmt: on
"""Suffixes of the files that are read from a directory, besides JSON lines and Parquet."""

_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_PARQUET_SUFFIXES = (".parquet",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One text and its source: a path, with a row number in files of many rows."""

    text: str
    source: str


class BadRow(StrEnum):
    """Why a row could not be used."""

    NOT_UTF8 = "not UTF-8"
    NOT_JSON = "not a JSON object"
    NO_COLUMN = "no such column"
    NOT_A_STRING = "not a string"
    EMPTY = "empty"


@dataclass(kw_only=True)
class ReadReport:
    """Counts of documents and of unusable rows, updated while documents are read."""

    documents: int = 0
    """Rows that became documents."""

    bad: Counter[BadRow] = field(default_factory=Counter)
    """Unusable rows, by reason."""

    first_bad: dict[BadRow, str] = field(default_factory=dict)
    """Place of the first row with each reason."""

    skipped_files: Counter[str] = field(default_factory=Counter)
    """Number of files in a directory that were skipped because of their suffix, by suffix."""

    def add_bad(self, reason: BadRow, where: str) -> None:
        """Count a bad row."""
        self.bad[reason] += 1
        self.first_bad.setdefault(reason, where)

    def summary(self) -> str:
        """The bad rows in words: `2 not UTF-8 (first: a.txt, byte 17)`."""
        return "; ".join(
            f"{count} {reason} (first: {self.first_bad[reason]})"
            for reason, count in self.bad.most_common()
        )


@dataclass(frozen=True, kw_only=True)
class FilesConfig:
    """Text of the user's own, from a file, a directory or a glob pattern."""

    kind: Literal["files"] = "files"

    path: str
    """A file, a directory (searched with its sub-directories) or a glob pattern."""

    name: str = "own-text"
    """Name of the source in the blend, the manifest and the metrics."""

    licence: str = "unstated"
    """Licence of the text, for the manifest."""

    column: str = "text"
    """The field that holds the text, in JSON lines and Parquet."""

    max_bytes: int | None = None
    """Take at most this much text (UTF-8 bytes), drawn evenly over the documents."""

    max_bad_fraction: float = 0.05
    """Largest share of unusable rows; more are an error."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path is empty: name a file, a directory or a glob pattern")
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ConfigError(
                f"name = {self.name!r}: it names files, so letters, digits, and . + - _ inside"
            )
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ConfigError(f"max_bytes = {self.max_bytes}: it must be positive, or None for all")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction = {self.max_bad_fraction}: it lies in [0, 1]")


def read_documents(config: FilesConfig, report: ReadReport) -> Iterator[Document]:
    """Yield the documents of `config.path` and update `report`.

    Raises DataError if there are none, or too many unusable rows.
    """
    files = find_files(config.path, report)
    is_single_text = len(files) == 1 and _is_plain_text(files[0])
    for file in files:
        name = file.name.lower()
        if name.endswith(_JSONL_SUFFIXES):
            yield from _json_lines(file, config.column, report)
        elif name.endswith(_PARQUET_SUFFIXES):
            yield from _parquet(file, config.column, report)
        else:
            yield from _plain_text(file, report, is_single=is_single_text)
    num_bad = report.bad.total()
    if num_bad > config.max_bad_fraction * (report.documents + num_bad):
        raise DataError(
            f"{config.path}: {num_bad} of {report.documents + num_bad} rows cannot be used: "
            f"{report.summary()}; check the column (column = {config.column!r}) and the encoding, "
            f"or raise max_bad_fraction (now {config.max_bad_fraction})"
        )
    if report.documents == 0:
        raise DataError(f"{config.path}: no documents; name text, .jsonl or .parquet files")


def find_files(path: str, report: ReadReport | None = None) -> list[Path]:
    """The files of a path, sorted; hidden files and, in directories, non-text ones are left out."""
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        found = sorted(
            file
            for file in root.rglob("*")
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(root).parts)
        )
        files = [file for file in found if _is_known(file)]
        if report is not None:
            report.skipped_files.update(file.suffix for file in found if not _is_known(file))
    else:
        matches = (Path(match) for match in glob.glob(str(root), recursive=True))
        files = sorted(file for file in matches if file.is_file())
    if not files:
        raise DataError(
            f"{path}: no such file, no text files in it, or no match; "
            f"name a file, a directory or a glob pattern such as 'notes/**/*.md'"
        )
    return files


def _is_plain_text(file: Path) -> bool:
    return not file.name.lower().endswith(_JSONL_SUFFIXES + _PARQUET_SUFFIXES)


def _is_known(file: Path) -> bool:
    return not _is_plain_text(file) or file.suffix.lower() in TEXT_SUFFIXES


def _plain_text(file: Path, report: ReadReport, *, is_single: bool) -> Iterator[Document]:
    raw = _read_bytes(file)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if is_single:
            raise DataError(
                f"{file} is not UTF-8 at byte {error.start} (value 0x{raw[error.start]:02x}); "
                f"convert it, for example: iconv -f LATIN1 -t UTF-8"
            ) from error
        report.add_bad(BadRow.NOT_UTF8, f"{file}, byte {error.start}")
        return
    yield from _accept(text, str(file), report)


def _json_lines(file: Path, column: str, report: ReadReport) -> Iterator[Document]:
    with _open_lines(file) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield from _json_row(line, f"{file}:{number}", column, report)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{file} is truncated or damaged ({error}); fetch it again") from error


def _json_row(line: bytes, where: str, column: str, report: ReadReport) -> Iterator[Document]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        report.add_bad(BadRow.NOT_UTF8, where)
        return
    except (json.JSONDecodeError, RecursionError):
        report.add_bad(BadRow.NOT_JSON, where)
        return
    if not isinstance(row, dict):
        report.add_bad(BadRow.NOT_JSON, where)
    elif column not in row:
        report.add_bad(BadRow.NO_COLUMN, where)
    else:
        yield from _accept(row[column], where, report)


def _parquet(file: Path, column: str, report: ReadReport) -> Iterator[Document]:
    for number, value in enumerate(parquet_rows(file, column)):
        where = f"{file}, row {number}"
        if value is None:
            report.add_bad(BadRow.NOT_A_STRING, where)
            continue
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            report.add_bad(BadRow.NOT_UTF8, where)
            continue
        yield from _accept(text, where, report)


def _accept(text: object, where: str, report: ReadReport) -> Iterator[Document]:
    if not isinstance(text, str):
        report.add_bad(BadRow.NOT_A_STRING, where)
    elif not text.strip():
        report.add_bad(BadRow.EMPTY, where)
    elif not _is_encodable(text):
        report.add_bad(BadRow.NOT_UTF8, where)
    else:
        report.documents += 1
        yield Document(text=text, source=where)


def _is_encodable(text: str) -> bool:
    # JSON can contain half of a surrogate pair, which UTF-8 cannot encode and no tokenizer accepts.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); check its permissions") from error


def _open_lines(file: Path) -> BufferedIOBase:
    try:
        return gzip.GzipFile(file, "rb") if file.suffix == ".gz" else file.open("rb")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); check its permissions") from error
