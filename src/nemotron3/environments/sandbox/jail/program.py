"""The process of one program: it gives up all that it could misuse, then runs the program.

What a program can find in its memory is the interpreter, its own source and its own input; what is
expected of it never comes here. Its standard output, errors and results are files in memory that
`RLIMIT_FSIZE` bounds, so that nobody has to read along.
"""

import gc
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from . import landlock, seccomp, system
from .namespaces import NOBODY

_FILE_NAME = "program.py"
_RESULTS = 3
_JOB = 4
_READY = 5
"""Descriptors of a program's process: 0 to 2 as ever, then these."""
_MAX_DESCRIPTORS = 32
_STACK_BYTES = 64 << 20
_FLUSH_FAILED = 120


def become_program(files: Sequence[int], ready: int, limits: Mapping[str, Any], rules: int) -> None:
    """Turn this process into the program of a job; does not return.

    `files` are standard input, output and error, the results and the job. One byte is written to
    `ready` when everything has been given up; without it the program did not begin.
    """
    _take_files([*files, ready], rules)
    _limit(limits)
    _give_up(_READY + 1)
    os.write(_READY, b"1")
    os.closerange(_READY, _MAX_DESCRIPTORS)
    _run(_read_job())


def _take_files(files: Sequence[int], rules: int) -> None:
    """Put the files where they belong, with the rules behind them, and close everything else."""
    # Twice, because a place may be that of a file which is still to be moved.
    high = [os.dup2(file, 100 + place) for place, file in enumerate([*files, rules])]
    for place, file in enumerate(high):
        os.dup2(file, place)
    os.closerange(len(high), os.sysconf("SC_OPEN_MAX"))


def _limit(limits: Mapping[str, Any]) -> None:
    cpu_s = max(1, round(limits["cpu_s"]))
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NOFILE, _MAX_DESCRIPTORS),
        (resource.RLIMIT_STACK, min(_STACK_BYTES, limits["memory_bytes"] // 2)),
        (resource.RLIMIT_NPROC, 1),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 16),
    ):
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def _give_up(rules: int) -> None:
    """Give up user, capabilities, files, and all but the harmless system calls."""
    os.setsid()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    system.drop_capabilities()
    # After the change of user, which clears it.
    system.prctl(system.PR_SET_PDEATHSIG, signal.SIGKILL)
    system.prctl(system.PR_SET_DUMPABLE, 0)
    system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)
    if landlock.abi():
        landlock.restrict(rules)
    os.close(rules)
    seccomp.install(seccomp.packed_filter(os.getpid()))


def _read_job() -> dict[str, Any]:
    os.lseek(_JOB, 0, os.SEEK_SET)
    with open(_JOB, encoding="utf-8") as file:
        return json.load(file)


def _run(job: Mapping[str, Any]) -> NoReturn:
    """Run a program as the main module, then make its calls, and exit with its status."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = [_FILE_NAME]
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (it ends with the process)
    status = 0
    try:
        exec(compile(job["source"], _FILE_NAME, "exec"), module.__dict__)
        if job["function"] is not None:
            _call(_function(module, job["function"]), job["arguments"])
    except SystemExit as end:
        status = _status(end)
    except BaseException:  # noqa: BLE001  (whatever a program raises ends it)
        traceback.print_exc()
        status = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001  (a full file, or a stream of the program's own)
        status = status or _FLUSH_FAILED
    os._exit(status)


def _status(end: SystemExit) -> int:
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 255
    sys.stderr.write(f"{end.code}\n")
    return 1


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    """A function of the program, or a method of its class `Solution`."""
    if hasattr(module, name) or not hasattr(module, "Solution"):
        return getattr(module, name)
    return getattr(module.Solution(), name)


def _call(function: Callable[..., Any], calls: Sequence[Sequence[Any]]) -> None:
    """One line for each call: a list of the result, or an empty one where it raised."""
    with open(_RESULTS, "w", encoding="utf-8", closefd=False) as results:
        for arguments in calls:
            try:
                line = json.dumps([function(*arguments)])
            except Exception:  # noqa: BLE001  (the program's own)
                traceback.print_exc()
                line = "[]"
            results.write(f"{line}\n")


def prepare() -> None:
    """What every program would otherwise have to do itself, once before they are forked."""
    seccomp.packed_filter(1)
    gc.collect()
    gc.freeze()
