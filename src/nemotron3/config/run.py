"""`run.json`: the record of a run, from which it can be run again.

It contains the resolved configuration, the git revision of this package, the versions of its
installed dependencies, and the machine. It does not contain weights and data, which have manifests
of their own. The file is written before the first step, so a run that fails has one, too.

    write_run(run_dir, config, extra={"backends": {"ssd": "torch"}})
    config = read_run(run_dir, PretrainConfig)
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar, cast

from nemotron3.config.record import from_record, to_record
from nemotron3.errors import ConfigError, StorageError

RUN_FILE = "run.json"
FORMAT = 3
T = TypeVar("T")


def run_record(config: Any, *, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record as JSON; `extra` holds facts known only at run time (backends, device, corpus)."""
    return {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "git": git_revision(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "config": to_record(config),
        "extra": to_record(dict(extra or {})),
    }


def write_run(directory: Path, config: Any, *, extra: Mapping[str, Any] | None = None) -> Path:
    """Write `run.json` into the run's directory, atomically."""
    path = directory / RUN_FILE
    write_json(path, run_record(config, extra=extra))
    return path


def write_json(path: Path, record: Any) -> None:
    """Write a record as JSON, atomically; creates the folder."""
    text = json.dumps(to_record(record), indent=2, allow_nan=False) + "\n"
    partial = path.with_suffix(".json.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written ({error.strerror}); choose a run directory that is "
            "writable and has space"
        ) from error


def read_run(path: Path, cls: type[T]) -> T:
    """The configuration of a recorded run; `path` is the file or the run's directory."""
    return from_record(cls, read_record(path)["config"], path="config")


def read_record(path: Path) -> dict[str, Any]:
    """The whole record of a run, with the facts known at run time under `extra`."""
    file = path / RUN_FILE if path.is_dir() else path
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); name a run directory or its {RUN_FILE}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); it may have been cut short") from error
    if not isinstance(record, dict) or "config" not in record:
        raise ConfigError(f"{file} holds no 'config'; is it the {RUN_FILE} of a run?")
    found = cast("dict[str, Any]", record)
    if found.get("format") != FORMAT:
        raise ConfigError(
            f"{file} has format {found.get('format')!r}, this version reads {FORMAT}; "
            "use the revision of the package that its 'git' entry names"
        )
    found.setdefault("extra", {})
    return found


def git_revision() -> dict[str, Any] | None:
    """Commit of the checkout of this package, and whether it is clean; None for a wheel.

    The package's own file must be tracked: a wheel inside a user's repository is not that
    repository's code.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    commit = _git(here.parent, "rev-parse", "HEAD")
    changes = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "is_clean": changes == ""}


def package_versions() -> dict[str, str]:
    """Versions of this package and of each installed package among its dependencies."""
    versions = {"nemotron3": metadata.version("nemotron3")}
    for requirement in metadata.requires("nemotron3") or []:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return dict(sorted(versions.items()))


def _git(directory: Path, *arguments: str) -> str | None:
    """The output of git, or None if git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
