"""The filter of system calls, run by an interpreter of its own for both architectures.

The kernel runs it for this machine alone; what another one would be allowed is read here.
"""

import pytest

from nemotron3.environments.sandbox.jail.seccomp import _ALLOWED, build_filter

ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
PID = 4321
# The numbers of asm/unistd_64.h and asm-generic/unistd.h.
DANGEROUS = {
    "x86_64": {
        "pwrite64": 18, "socket": 41, "connect": 42, "clone": 56, "fork": 57, "vfork": 58,
        "execve": 59, "ftruncate": 77, "rename": 82, "mkdir": 83, "unlink": 87, "symlink": 88,
        "chmod": 90, "ptrace": 101, "setuid": 105, "prctl": 157, "chroot": 161, "mount": 165,
        "tkill": 200, "io_setup": 206, "unshare": 272, "splice": 275, "perf_event_open": 298,
        "setns": 308, "process_vm_readv": 310, "seccomp": 317, "memfd_create": 319, "bpf": 321,
        "execveat": 322, "userfaultfd": 323, "io_uring_setup": 425, "clone3": 435, "openat2": 437,
    },
    "aarch64": {
        "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "mount": 40, "pivot_root": 41,
        "ftruncate": 46, "fchmod": 52, "chroot": 51, "pwrite64": 68, "unshare": 97, "ptrace": 117,
        "tkill": 130, "setuid": 146, "prctl": 167, "socket": 198, "connect": 203, "clone": 220,
        "execve": 221, "perf_event_open": 241, "setns": 268, "process_vm_readv": 270,
        "seccomp": 277, "memfd_create": 279, "bpf": 280, "execveat": 281, "userfaultfd": 282,
        "io_uring_setup": 425, "clone3": 435, "openat2": 437,
    },
}  # fmt: skip
CHECKED = {
    "x86_64": {"openat": 257, "ioctl": 16, "fcntl": 72, "kill": 62, "tgkill": 234, "prlimit": 302},
    "aarch64": {"openat": 56, "ioctl": 29, "fcntl": 25, "kill": 129, "tgkill": 131, "prlimit": 261},
}

each = pytest.mark.parametrize("machine", AUDIT)


def judge(program, machine, number, *arguments, architecture=None):
    """What a filter says of a call: classic BPF over `struct seccomp_data`."""
    data = [number, architecture or AUDIT[machine], 0, 0]
    for place in range(6):
        value = arguments[place] if place < len(arguments) else 0
        data += [value & 0xFFFFFFFF, value >> 32 & 0xFFFFFFFF]
    accumulator, at = 0, 0
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == 0x20:
            assert k % 4 == 0
            accumulator = data[k // 4]
        elif code == 0x06:
            return k
        else:
            holds = {
                0x15: accumulator == k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }[code]
            at += if_true if holds else if_false


@each
def test_the_harmless_are_allowed_and_all_others_refused(machine):
    program = build_filter(PID, machine)
    column = list(AUDIT).index(machine)
    allowed = {numbers[column] for numbers in _ALLOWED.values()} - {None}
    assert len(program) < 4096  # the kernel's bound
    assert all(0 <= jump < 256 for _, *jumps, _ in program for jump in jumps)
    for number in range(600):
        verdict = judge(program, machine, number, *[0x77777777] * 6)
        assert (verdict == ALLOW) == (number in allowed), number
        assert verdict in (ALLOW, REFUSE)
    for name, number in DANGEROUS[machine].items():
        assert judge(program, machine, number) == REFUSE, name


@each
def test_a_call_of_another_architecture_kills(machine):
    program = build_filter(PID, machine)
    for architecture in (0x40000003, 0x40000028, *set(AUDIT.values()) - {AUDIT[machine]}):
        assert judge(program, machine, 0, architecture=architecture) == KILL
    if machine == "x86_64":
        assert judge(program, machine, 0x40000000) == KILL
        assert judge(program, machine, 0xFFFFFFFF) == KILL


@each
def test_arguments_decide_where_a_call_has_two_sides(machine):
    program, numbers = build_filter(PID, machine), CHECKED[machine]

    def verdict(name, *arguments):
        return judge(program, machine, numbers[name], *arguments)

    cloexec, directory = 0o2000000, 0o200000
    assert verdict("openat", 0, 0, cloexec | directory) == ALLOW
    for flags in (0o1, 0o2, 0o100, 0o1000, 0o2000, 0o20200000 | 0o2, 0o20000000):
        assert verdict("openat", 0, 0, flags | cloexec) == REFUSE
    assert verdict("ioctl", 0, 0x5401) == ALLOW
    for request in (0x5412, 0x5413, 0x8901, 0):
        assert verdict("ioctl", 0, request) == REFUSE
    assert [verdict("fcntl", 0, command) for command in (0, 1, 2, 3, 1030)] == [ALLOW] * 5
    for command in (4, 5, 6, 8, 10, 1024, 1031, 1033):
        assert verdict("fcntl", 0, command) == REFUSE
    assert verdict("kill", PID, 6) == ALLOW
    assert verdict("tgkill", PID, PID, 6) == ALLOW
    for target in (0, 1, PID + 1, (1 << 64) - 1):
        assert verdict("kill", target, 6) == REFUSE
        assert verdict("tgkill", target, target, 6) == REFUSE
    assert verdict("kill", PID, 9) == REFUSE
    assert verdict("tgkill", PID, PID, 9) == REFUSE
    assert verdict("prlimit", 0, 7, 0) == ALLOW
    for arguments in ((PID, 7, 0), (0, 7, 4096), (0, 7, 1 << 33)):
        assert verdict("prlimit", *arguments) == REFUSE
