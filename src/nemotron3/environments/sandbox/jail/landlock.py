"""Landlock: a process gives up the file system but for what it names, without any privilege.

Programs may read the standard library and nothing else; where the kernel knows them (ABI 4 and 6)
TCP ports, abstract sockets and signals to other processes are given up too.

Source: Linux, Documentation/userspace-api/landlock.rst.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from .system import (
    LANDLOCK_ADD_RULE,
    LANDLOCK_CREATE_RULESET,
    LANDLOCK_RESTRICT_SELF,
    syscall,
)

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_TCP = 0b11
_SCOPED = 0b11
# The number of rights in the file system that each ABI knows: they are bits from the lowest on.
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_NUM_RIGHTS = 16


def abi() -> int:
    """The version that the kernel has; 0 for none."""
    try:
        return syscall("landlock", LANDLOCK_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def create_ruleset(folders: Iterable[str], trees: Iterable[str]) -> int:
    """A descriptor of the rules: folders that may be listed, files and trees that may be read."""
    version = abi()
    attributes = [(1 << _NUM_RIGHTS.get(version, _NEWEST_NUM_RIGHTS)) - 1]
    attributes += [_TCP] if version >= 4 else []
    attributes += [_SCOPED] if version >= 6 else []
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    buffer = ctypes.create_string_buffer(packed, len(packed))
    ruleset = syscall("landlock", LANDLOCK_CREATE_RULESET, buffer, len(packed), 0)
    for path in folders:
        _add(ruleset, path, _READ_DIR)
    for path in trees:
        _add(ruleset, path, _READ_FILE | (_READ_DIR if os.path.isdir(path) else 0))
    return ruleset


def _add(ruleset: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        packed = struct.pack("=Qi", rights, parent)
        rule = ctypes.create_string_buffer(packed, len(packed))
        syscall("landlock", LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(parent)


def restrict(ruleset: int) -> None:
    """Hold this process to the rules, for good."""
    syscall("landlock", LANDLOCK_RESTRICT_SELF, ruleset, 0)
