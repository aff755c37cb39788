"""Compile the C++ sources of operations, once per machine.

The compiler is the system's (`CXX`, else c++, g++ or clang++), and the target is the machine's own
processor. Libraries are kept under ~/.cache/nemotron3 (XDG_CACHE_HOME). Their names contain a
digest of the sources, the command, the compiler and the processor, so a library is never used after
one of these has changed. Without a compiler, or with NEMOTRON3_NATIVE=0, `auto` takes PyTorch's
operations. NEMOTRON3_CXXFLAGS has further flags for the compiler, such as -mno-avx512bf16 for a
library without these instructions; it is read once.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from nemotron3.errors import BackendUnavailableError
from nemotron3.runtime.processors import fit_pytorch

HEADERS = Path(__file__).parent
TEAMS = HEADERS / "team.cpp"
"""The source of the library that provides the threads of all others."""
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-pthread",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-psabi",
)

_log = logging.getLogger(__name__)
_compiling = threading.Lock()
"""Held while compiling: threads that need the same library wait for the first of them."""


@functools.cache
def available() -> bool:
    """Whether C++ can be compiled here; false with NEMOTRON3_NATIVE=0."""
    if os.environ.get("NEMOTRON3_NATIVE") == "0" or sys.platform != "linux":
        return False
    return _compiler() is not None


@functools.cache
def library(source: Path) -> ctypes.CDLL:
    """The library of a C++ source, compiled on first use.

    Raises BackendUnavailableError without a compiler, or where the source does not compile.
    """
    compiler = _compiler()
    if compiler is None:
        raise BackendUnavailableError(
            f"{source} needs a C++ compiler, and neither CXX nor c++, g++ or clang++ names one; "
            "install g++, or use backend='torch'"
        )
    path = _cache() / f"{source.parent.name}-{_digest(source, compiler)}.so"
    with _compiling:
        if not path.exists():
            _log.info("compiling %s for this processor, once", source)
            _compile(compiler, source, path)
    if source == TEAMS:
        fit_pytorch()
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library(TEAMS)
    return ctypes.CDLL(str(path))


@functools.cache
def flags() -> tuple[str, ...]:
    """The flags of the compiler."""
    return *FLAGS, *shlex.split(os.environ.get("NEMOTRON3_CXXFLAGS", ""))


def _compile(compiler: str, source: Path, path: Path) -> None:
    """Compile into a temporary file and rename it: several processes may compile one source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *flags(), f"-I{HEADERS}", "-o", str(made), str(source)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise BackendUnavailableError(
                f"{source} does not compile; set NEMOTRON3_NATIVE=0 to do without. "
                f"{' '.join(command)}:\n{run.stderr[-2000:]}"
            )
        made.replace(path)


@functools.cache
def _compiler() -> str | None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


@functools.cache
def _cache() -> Path:
    """A writable folder: the user's cache, else one below the system's temporary folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemotron3"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        home = Path(tempfile.gettempdir()) / f"nemotron3-{os.getuid()}"
        home.mkdir(mode=0o700, exist_ok=True)
        if home.stat().st_uid != os.getuid():
            raise BackendUnavailableError(
                f"{home} belongs to someone else; set XDG_CACHE_HOME to a folder of yours"
            ) from None
    return home


def _digest(source: Path, compiler: str) -> str:
    digest = hashlib.sha256()
    for path in [source, *sorted(HEADERS.glob("*.h"))]:
        digest.update(path.read_bytes())
    digest.update(" ".join([compiler, *flags()]).encode())
    digest.update(_version(compiler).encode())
    digest.update(_processor().encode())
    return digest.hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on: the model and the features of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return "\n".join([platform.machine(), *told[:2]])
