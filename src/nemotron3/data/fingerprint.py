"""Fingerprints of a run's data, file by file, so that a change is detected and named.

A file is unchanged if its size and times are the recorded ones, or else if its SHA-256 is. So
checking a large corpus is cheap, and a file that was only touched, copied or moved back counts as
unchanged.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nemotron3.errors import DataError

_CHUNK_BYTES = 1 << 22
_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class FileState:
    """The recorded state of a file."""

    num_bytes: int
    mtime_ns: int
    """Time of the last change of the content."""
    ctime_ns: int
    """Time of the last change of content, name or permissions; it cannot be set by a program."""
    sha256: str


def file_state(file: Path) -> FileState:
    """The state of a file; reads the whole file."""
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            found = file.stat()
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); check its permissions") from error
    return FileState(
        num_bytes=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
        sha256=digest.hexdigest(),
    )


def file_states(files: Iterable[Path], *, below: Path | None = None) -> dict[str, FileState]:
    """The states of files by path, relative to `below` if given."""
    return {
        str(file if below is None else file.relative_to(below)): file_state(file) for file in files
    }


def file_changes(
    before: Mapping[str, FileState], files: Iterable[Path], *, below: Path | None = None
) -> list[str]:
    """The differences from the recorded files, each in a few words: `edited: notes/a.txt`."""
    now = {str(file if below is None else file.relative_to(below)): file for file in files}
    edited = [name for name, state in before.items() if name in now and _differs(state, now[name])]
    removed = [name for name in before if name not in now]
    added = [name for name in now if name not in before]
    changes = [f"edited: {name}" for name in edited]
    digests = {file_state(now[name]).sha256: name for name in added} if removed else {}
    for name in removed:
        new_name = digests.pop(before[name].sha256, None)
        if new_name is None:
            changes.append(f"removed: {name}")
        else:
            changes.append(f"renamed: {name} to {new_name}")
            added.remove(new_name)
    return changes + [f"added: {name}" for name in added]


def in_words(changes: list[str]) -> str:
    """The first few changes, and the number of the others."""
    rest = len(changes) - _NAMED
    return "; ".join(changes[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")


def _differs(state: FileState, file: Path) -> bool:
    found = file.stat()
    if found.st_size != state.num_bytes:
        return True
    if (found.st_mtime_ns, found.st_ctime_ns) == (state.mtime_ns, state.ctime_ns):
        return False
    return file_state(file).sha256 != state.sha256
