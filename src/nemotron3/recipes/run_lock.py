"""One process at a time in a run's folder, by a lock that ends with the process, however it ends.

Two processes in one folder would write each other's checkpoints and metrics. The lock is that of
the operating system (`flock`) on the file `lock`, which says who holds it; the file is removed at
the end. One that a killed process left locks nothing.

    @holds_folder()
    def sft(run, *, runs=Path("runs"), callback=None): ...
"""

import errno
import fcntl
import inspect
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from nemotron3.errors import ConfigError, StorageError
from nemotron3.recipes.run_folder import SUMMARY_FILE, RunCallback

LOCK_FILE = "lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=_Named)
P = ParamSpec("P")
R = TypeVar("R")


def holds_folder(
    within: str = "",
) -> Callable[[Callable[Concatenate[C, P], R]], Callable[Concatenate[C, P], R]]:
    """Have a function hold the folder that its first argument names, while it runs.

    The folder is in `within` of the function's own argument `runs`; its `callback` hears of a file
    system without locks. A finished run is only shown, so its folder need not be writable.
    """

    def holding(execute: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
        signature = inspect.signature(execute)

        @wraps(execute)
        def held(run: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(run, *args, **kwargs)
            given.apply_defaults()
            folder: Path = given.arguments["runs"] / within / run.name
            callback: RunCallback = given.arguments["callback"] or RunCallback()
            if (folder / SUMMARY_FILE).exists():
                return execute(run, *args, **kwargs)
            with folder_lock(folder, say=callback.stage):
                return execute(run, *args, **kwargs)

        return held

    return holding


@contextmanager
def folder_lock(folder: Path, *, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a folder, made where there is none; ConfigError, with the owner, if it is held.

    Folders that this has made and that are still empty at the end are removed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _locked(folder / LOCK_FILE, say)
    try:
        yield
    finally:
        with suppress(OSError):  # someone may have deleted the folder
            (folder / LOCK_FILE).unlink()
        os.close(descriptor)
        for path in made:
            try:
                path.rmdir()
            except OSError:  # it has got content
                break


def _locked(file: Path, say: Callable[[str], None]) -> int:
    """The descriptor of the locked file."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another process has removed the empty folder meanwhile
            continue
        except OSError as error:
            raise StorageError(
                f"{file} could not be written ({error.strerror}); choose a run directory that is "
                "writable and has space"
            ) from error
        try:
            _lock(descriptor, file, say)
            if _is_at(descriptor, file):
                _write_owner(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner has removed it between opening and locking


def _lock(descriptor: int, file: Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{file.parent} is in use by {_owner(descriptor)}; wait for its end or stop it, and "
            "the same command goes on from there, or give this run another --name"
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        say(
            f"The file system of {file.parent} has no locks ({error.strerror}): see to it that no "
            "other process uses this folder"
        )


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int) -> None:
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _owner(descriptor: int) -> str:
    try:
        owner: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):  # it has not written who it is yet
        return "another process"
