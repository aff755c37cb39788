"""The system calls that a program may make: a list of what is allowed, as a seccomp filter.

Everything else is refused with EPERM, so that a program sees an exception. Among that are new
processes and threads (`clone`, `fork`), `execve`, sockets, `ptrace`, signals to others, `prctl`,
`mount`, everything that writes to a file system by name, and whatever a later kernel adds.
A call of another architecture or of x32, which would have other numbers, kills the process.

The filter is classic BPF (Linux, Documentation/userspace-api/seccomp_filter.rst).
"""

import ctypes
import struct
from collections.abc import Sequence
from functools import lru_cache

from .system import MACHINE, PR_SET_SECCOMP, prctl

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_MODE_FILTER = 2
_X32 = 0x40000000
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# name: (x86_64, aarch64); None where the architecture has none.
_ALLOWED: dict[str, tuple[int | None, int | None]] = {
    # its files: standard input and output, and the runtime
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "lseek": (8, 62),
    "close": (3, 57),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "fstat": (5, 80),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "fstatfs": (138, 44),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getcwd": (79, 17),
    "select": (23, None),
    "pselect6": (270, 72),
    "poll": (7, None),
    "ppoll": (271, 73),
    # memory
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "futex": (202, 98),
    "rseq": (334, 293),
    # itself
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getrusage": (98, 165),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getrandom": (318, 278),
    "exit": (60, 93),
    "exit_group": (231, 94),
    # time and its own signals
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "restart_syscall": (219, 128),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "pause": (34, None),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
}

Instruction = tuple[int, int, int, int]
_Test = tuple[int, str, tuple[int, ...]]
"""An argument's word as an offset, whether it is "in" or "out" of the values, or has "no bits"."""

_SIGKILL = 9
# O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_APPEND and the bit that makes O_TMPFILE.
_WRITING = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000
_TCGETS, _FIOCLEX = 0x5401, 0x5451
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL and F_DUPFD_CLOEXEC: no owner of signals, no leases, no locks.
_FCNTL = (0, 1, 2, 3, 1030)


def _low(argument: int) -> int:
    return 16 + 8 * argument


def _checked_calls(pid: int) -> dict[str, tuple[int, int, list[_Test]]]:
    """Calls that are allowed with some arguments: numbers, then tests that must all hold."""
    # A program that could kill itself would look like one that the host had no memory for.
    return {
        "openat": (257, 56, [(_low(2), "no bits", (_WRITING,))]),
        "ioctl": (16, 29, [(_low(1), "in", (_TCGETS, _FIOCLEX))]),
        "fcntl": (72, 25, [(_low(1), "in", _FCNTL)]),
        "kill": (62, 129, [(_low(0), "in", (pid,)), (_low(1), "out", (_SIGKILL,))]),
        "tgkill": (234, 131, [(_low(0), "in", (pid,)), (_low(2), "out", (_SIGKILL,))]),
        "prlimit64": (
            302,
            261,
            [(_low(0), "in", (0,)), (_low(2), "in", (0,)), (_low(2) + 4, "in", (0,))],
        ),
    }


def build_filter(pid: int, machine: str = MACHINE) -> list[Instruction]:
    """The program for a process of that number, which may send signals to itself alone."""
    column = list(_ARCHITECTURES).index(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for numbers in _ALLOWED.values():
        number = numbers[column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for *numbers, tests in _checked_calls(pid).values():
        block = _block(tests)
        program += [(_EQUAL, 0, len(block), numbers[column]), *block]
    return [*program, (_RETURN, 0, 0, _REFUSE)]


def _block(tests: Sequence[_Test]) -> list[Instruction]:
    """Instructions that allow a call where every test holds, and refuse it otherwise."""
    refuse = sum(1 + len(values) for _, _, values in tests) + 1
    block: list[Instruction] = []
    for offset, kind, values in tests:
        block.append((_LOAD, 0, 0, offset))
        following = len(block) + len(values)
        for place, value in enumerate(values, start=1):
            after = len(block) + 1
            to_refuse, to_following = refuse - after, following - after
            if kind == "in":
                otherwise = to_refuse if place == len(values) else 0
                block.append((_EQUAL, to_following, otherwise, value))
            else:
                block.append((_EQUAL if kind == "out" else _ANY_BIT, to_refuse, 0, value))
    return [*block, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]


@lru_cache(maxsize=1)
def packed_filter(pid: int) -> bytes:
    """The filter of `build_filter` as the kernel reads it.

    In a namespace of its own every program is number 1, so the server packs that one beforehand.
    """
    return b"".join(struct.pack("HBBI", *each) for each in build_filter(pid))


def install(packed: bytes) -> None:
    """Hold this process to a filter, for good."""
    code = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HxxxxxxQ", len(packed) // 8, ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, _MODE_FILTER, ctypes.create_string_buffer(header))
