"""How a jail is built: by bubblewrap, or by itself with namespaces and Landlock.

In both, each program is held by the same limits and the same filter of system calls. bubblewrap
(https://github.com/containers/bubblewrap) is preferred where it is installed: it is small, audited,
and allowed to make namespaces on systems that forbid them to others. Without it the jail enters
namespaces itself; where those are forbidden, as in most containers, Landlock still hides the file
system and the filter everything else. There is no third way: a program is never run unprotected.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from nemotron3.environments.sandbox.jail import landlock, system
from nemotron3.environments.sandbox.jail.namespaces import NOT_STANDARD, standard_library
from nemotron3.errors import BackendUnavailableError

_HERE = Path(__file__).parent
_JAIL_HOME = "/jail-home"
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from jail.server import main; main()"
_PYTHON_OPTIONS = ("-P", "-s", "-S", "-B", "-X", "utf8")
_MACHINES = ("x86_64", "aarch64")
_START_TIMEOUT_S = 60.0
INSTALL = (
    "install bubblewrap (apt install bubblewrap, dnf install bubblewrap), or use Linux 5.13 or "
    "later with Landlock, on x86_64 or aarch64"
)


class SandboxUnavailableError(BackendUnavailableError):
    """Programs cannot be run safely on this machine; the message says what is missing."""


class Backend(StrEnum):
    """What builds the jail."""

    BUBBLEWRAP = "bubblewrap"
    LANDLOCK = "landlock"


@dataclass(frozen=True)
class Jail:
    """A jail that has been built: its process, the socket to it, and what holds in it."""

    backend: Backend
    process: subprocess.Popen[bytes]
    control: socket.socket
    has_namespaces: bool
    landlock_abi: int
    """0 where the kernel has no Landlock."""

    def __str__(self) -> str:
        layers = ["namespaces"] if self.has_namespaces else []
        layers += [f"Landlock ABI {self.landlock_abi}"] if self.landlock_abi else []
        return f"{self.backend} ({', '.join([*layers, 'seccomp'])})"


def bubblewrap_command(program: str, worker: Sequence[str]) -> list[str]:
    """The command that runs a worker inside bubblewrap.

    It sees the libraries of the system and the standard library, read-only, and nothing else. As
    root it keeps what it needs to make its programs those of another user, and to end them.
    """
    command = [program, "--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    if os.geteuid():
        command += ["--unshare-user"]
    else:
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
            command += ["--cap-add", capability]
    command += ["--new-session", "--hostname", "sandbox"]
    jail = f"{_JAIL_HOME}/jail"
    shown = [path for path in _runtime() if not any(_is_in(path, tree) for tree in _runtime())]
    # Left to itself, bubblewrap makes folders that another user than root cannot enter.
    parents = {str(parent) for path in (*shown, jail) for parent in Path(path).parents}
    for path in sorted(parents - {"/"}):
        command += ["--perms", "0755", "--dir", path]
    for path in shown:
        command += ["--ro-bind", path, path]
    for path in ("/lib", "/lib64"):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
    folders = [*standard_library(), "/usr/lib/python3"]
    for path in (os.path.join(folder, name) for folder in folders for name in NOT_STANDARD):
        if os.path.isdir(path):
            command += ["--tmpfs", path]
    command += ["--ro-bind", str(_HERE / "jail"), jail]
    return [*command, "--remount-ro", "/", "--chdir", "/", "--", *worker]


def _runtime() -> list[str]:
    """What the interpreter needs: libraries of the system, its own, and itself."""
    system_libraries = [path for path in ("/lib", "/lib64") if not os.path.islink(path)]
    paths = [
        "/usr/lib",
        "/usr/lib64",
        *system_libraries,
        *standard_library(),
        os.path.join(sys.base_prefix, "lib"),
        _python(),
    ]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _is_in(path: str, tree: str) -> bool:
    return path.startswith(f"{tree}/")


def _python() -> str:
    return os.path.realpath(sys.executable)


def _worker(control: int, home: str, namespaces: str) -> list[str]:
    return [_python(), *_PYTHON_OPTIONS, "-c", _BOOT, home, str(control), namespaces]


def _environment() -> dict[str, str]:
    """What the jail's process gets: nothing of ours but where its own libraries are.

    The order of sets is fixed, so that a program gives the same output each time.
    """
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"PYTHONHASHSEED": "0", **kept}


def open_jail(backend: Backend | None, probe: Callable[[Jail], None]) -> Jail:
    """Build a jail by the first backend that works here, or by the given one.

    `probe` tries the jail and raises `JailError` if it does not hold. Raises
    `SandboxUnavailableError` with what each backend lacks.
    """
    lacking: list[str] = []
    for each in Backend if backend is None else (Backend(backend),):
        found = _missing(each)
        if found is None:
            try:
                return _probed(_start(each), probe)
            except (JailError, OSError) as error:
                found = str(error)
        lacking.append(f"{each}: {found}")
    raise SandboxUnavailableError(
        f"no sandbox to run programs in on this machine ({'; '.join(lacking)}); {INSTALL}"
    )


class JailError(Exception):
    """A jail that could not be built, or does not hold."""


def _probed(jail: Jail, probe: Callable[[Jail], None]) -> Jail:
    try:
        probe(jail)
    except BaseException:
        close_jail(jail.process, jail.control)
        raise
    return jail


def _missing(backend: Backend) -> str | None:
    """What a backend lacks on this machine; None where it should work."""
    if sys.platform != "linux":
        return f"{sys.platform} is not Linux"
    if system.MACHINE not in _MACHINES:
        return f"no filter of system calls for {system.MACHINE}"
    if backend is Backend.BUBBLEWRAP:
        return None if shutil.which("bwrap") else "bwrap is not installed"
    return None if landlock.abi() else "the kernel has no Landlock, or it is switched off"


def _start(backend: Backend) -> Jail:
    control, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    said = os.memfd_create("sandbox-errors")
    if backend is Backend.BUBBLEWRAP:
        worker = _worker(other.fileno(), _JAIL_HOME, "given")
        command = bubblewrap_command(shutil.which("bwrap") or "bwrap", worker)
    else:
        command = _worker(other.fileno(), str(_HERE), "namespaces")
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            env=_environment(),
            pass_fds=(other.fileno(),),
            start_new_session=True,
        )
        other.close()
        try:
            hello = _hello(control)
        except JailError:
            close_jail(process, control)
            text = os.pread(said, 4000, 0).decode(errors="replace").strip()
            raise JailError((text or "it did not start").splitlines()[-1]) from None
    except OSError as error:
        control.close()
        raise JailError(str(error)) from error
    finally:
        other.close()
        os.close(said)
    return Jail(
        backend,
        process,
        control,
        has_namespaces=backend is Backend.BUBBLEWRAP or hello["namespaces"],
        landlock_abi=hello["landlock"],
    )


def _hello(control: socket.socket) -> Mapping[str, Any]:
    control.settimeout(_START_TIMEOUT_S)
    try:
        message = control.recv(4096)
    except OSError as error:
        raise JailError from error
    control.settimeout(None)
    if not message:
        raise JailError
    return json.loads(message)


def close_jail(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """End a jail: it kills its programs when the socket is closed, and goes."""
    control.close()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
