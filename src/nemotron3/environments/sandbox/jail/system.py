"""System calls that Python has no function for, through ctypes.

Each raises `OSError` with the name of the call where the kernel refuses.
"""

import ctypes
import os
import platform
import sys
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

MACHINE = platform.machine()
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# One number on every architecture: these are newer than the common table.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446

_CAPABILITY_VERSION = 0x20080522

# The names of the process itself: no file is looked for. Elsewhere than on Linux none is called.
_libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: Any) -> int:
    """A system call by number; integers are passed as 64 bits."""
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    return _checked(name, _libc.syscall(ctypes.c_long(number), *given))


def unshare(flags: int) -> None:
    """Move this process, or its next child (pid), into new namespaces."""
    _checked("unshare", _libc.unshare(ctypes.c_int(flags)))


def setns(descriptor: int, kind: int) -> None:
    """Go back to a namespace by its descriptor."""
    _checked("setns", _libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount, bind or change a mount."""
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        options.encode(),
    )
    _checked(f"mount {target}", result)


def pivot_root(new: str, old: str) -> None:
    """Change the root of this mount namespace."""
    syscall("pivot_root", _PIVOT_ROOT[MACHINE], new.encode(), old.encode())


def unmount(target: str) -> None:
    """Take a mount away, now for names and later for what still uses it."""
    _checked("umount2", _libc.umount2(target.encode(), ctypes.c_int(MNT_DETACH)))


def prctl(option: int, value: Any, *others: Any) -> None:
    """Set an attribute of this process."""
    given = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in (value, *others)]
    given += [ctypes.c_ulong(0)] * (4 - len(given))
    _checked(f"prctl {option}", _libc.prctl(ctypes.c_int(option), *given))


def drop_capabilities() -> None:
    """Give up every capability, for good where no program is executed."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _checked("capset", _libc.capset(header, nothing))
