"""Namespaces: a file system of the standard library alone, no network, and no other processes.

Root enters them as it is; anyone else through a user namespace, where the kernel allows one.
"""

import os
import signal
import socket
import sysconfig

from . import system
from .system import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
)

NOBODY = 65534
_KINDS = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
NOT_STANDARD = ("site-packages", "dist-packages")
"""Folders of packages that were installed beside the standard library; programs see none."""
_STAGE = "/tmp"  # covered by an empty file system of this namespace's own; nothing is written there


def standard_library() -> list[str]:
    """The folders of the standard library; more than one where the platform keeps two."""
    return sorted({os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")})


def standard_trees() -> list[str]:
    """What is in these folders, without packages installed beside it and links to elsewhere."""
    return [
        path
        for folder in standard_library()
        for name in sorted(os.listdir(folder))
        if name not in NOT_STANDARD
        and os.path.realpath(path := os.path.join(folder, name)).startswith(f"{folder}/")
        and os.path.exists(path)
    ]


def enter(control: socket.socket) -> "PidNamespaces":
    """Leave the host's namespaces; raises `OSError` where that is forbidden.

    What returns is a child of the process, the first of a pid namespace, and dies with its parent;
    the parent leaves the control socket to it and waits for it.
    """
    kinds = _KINDS
    uid, gid = os.geteuid(), os.getegid()
    system.unshare(kinds if uid == 0 else kinds | CLONE_NEWUSER)
    if uid:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {uid} 1"),
            ("gid_map", f"{NOBODY} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(line)
    child = os.fork()
    if child:
        control.close()
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 255)
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
    pid_namespaces = PidNamespaces()
    _private_root()
    return pid_namespaces


def _private_root() -> None:
    """Replace the root by an empty one that holds the standard library, all of it read-only."""
    nothing = MS_NOSUID | MS_NODEV | MS_NOEXEC
    system.mount("none", "/", None, MS_REC | MS_PRIVATE)
    folders = standard_library()
    # Descriptors outlive the mount that covers what they name.
    held = [os.open(folder, os.O_PATH | os.O_CLOEXEC) for folder in folders]
    system.mount("tmpfs", _STAGE, "tmpfs", nothing, "size=64k,mode=755")
    for folder, descriptor in zip(folders, held, strict=True):
        target = _STAGE + folder
        os.makedirs(target)
        system.mount(f"/proc/self/fd/{descriptor}", target, None, MS_BIND)
        kept = os.statvfs(target).f_flag & MS_NOEXEC
        system.mount(
            "none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept
        )
        for name in NOT_STANDARD:
            if os.path.isdir(os.path.join(target, name)):
                hidden = os.path.join(target, name)
                system.mount("tmpfs", hidden, "tmpfs", nothing | MS_RDONLY, "size=4k,mode=755")
        os.close(descriptor)
    os.chdir(_STAGE)
    system.pivot_root(".", ".")
    system.unmount(".")
    os.chdir("/")
    system.mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | nothing)


class PidNamespaces:
    """Gives each child a pid namespace of its own, in which it is number 1 and alone."""

    def __init__(self) -> None:
        self._own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)

    def fork(self) -> int:
        """As `os.fork`; whatever descends from the child dies with it."""
        system.unshare(CLONE_NEWPID)
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid != 0:
                system.setns(self._own, CLONE_NEWPID)
        return pid
