"""Files of JSON lines that a process appends to, and may be killed while it does.

A kill in the middle of a write leaves the beginning of a line. Readers leave it out, and whoever
appends removes it first: behind it, two records would be one line that nobody can read.

What is written for one moment of a run is whole or is written again: the moment is repeated by the
resumed run, and `append_lines` removes what the file holds of it and of what came later.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[Any]:
    """The records of a file in their order, without a half-written last line.

    A file that does not exist has none. Raises ValueError for a line that is not JSON.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            yield _decoded(path, number, line, json.loads)


def append_lines(
    path: Path, records: Iterable[Any], *, is_stale: Callable[[Any], bool] | None = None
) -> None:
    """Append a line for each record; they are on the disk when this returns.

    Removed first are a half-written last line, and with `is_stale` the first record of which it is
    true and everything after it.
    """
    if is_stale is not None:
        cut_lines(path, is_stale)
    else:
        _cut_half_line(path)
    text = "".join(json.dumps(record) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def cut_lines(
    path: Path, is_stale: Callable[[Any], bool], *, decode: Callable[[bytes], Any] = json.loads
) -> None:
    """Cut a file before its first line that is half-written or stale; the rest is not changed.

    Raises ValueError for a line before that which `decode` does not read.
    """
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") or is_stale(_decoded(path, number, line, decode)):
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)


def _cut_half_line(path: Path) -> None:
    """The same without reading the file: lines are searched from its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                end = start + last + 1
                break
            end = start
        if end < size:
            file.truncate(end)


def _decoded(path: Path, number: int, line: bytes, decode: Callable[[bytes], Any]) -> Any:
    try:
        return decode(line)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}, line {number} is damaged ({error}); "
            "repair the file, or move it away to begin anew"
        ) from error
