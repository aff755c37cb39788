"""Running programs that nobody trusts: what they print is read, and nothing else of them stays.

    async with Sandbox() as sandbox:
        result = await sandbox.run("print(int(input()) + 1)", stdin="41")
        result.ending, result.stdout            # Ending.OK, "42\n"
        result = await sandbox.call("f = lambda x: x + 1", "f", [[1], [2]])
        result.results                          # ((2,), (3,))

A jail is a process that is started once, at the first program, and forks each program, which costs
milliseconds; `python -m benchmarks.sandbox` says how many. What is expected of a program never
enters the jail: outputs are compared by the caller. A program's own crash, timeout or flood of
output is a result. A jail that fails is a `RolloutFailedError`, which is no verdict on the program;
the next one gets a new jail.
"""

import asyncio
import json
import logging
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from nemotron3.environments.sandbox.backends import (
    Backend,
    Jail,
    JailError,
    SandboxUnavailableError,
    close_jail,
    open_jail,
)
from nemotron3.environments.sandbox.limits import Ending, Limits, ProgramResult
from nemotron3.environments.verification import FailureKind, RolloutFailedError
from nemotron3.errors import ConfigError

_logger = logging.getLogger(__name__)
_GRACE_S = 30.0
"""How much longer than its time a program may be unaccounted for before its jail is given up."""
_SIGKILL = 9
_KILLED_FOR_TIME = 0.5
"""The share of its processor time from which a program that was killed was killed for that.

The kernel's limit counts ticks, which differ from what the process is found to have used. The
filter lets no program kill itself, so it cannot choose between a verdict and a failure.
"""
_PROBE = """
import os, socket

def is_refused(attempt, *arguments):
    try:
        attempt(*arguments)
    except OSError:
        return True
    return False

def can_import():
    try:
        import colorsys
    except ImportError:
        return False
    return True

print("\\n".join(name for name, holds in {
    "the standard library cannot be read by the programs' user": can_import(),
    "files can be read": is_refused(open, "/etc/passwd") and is_refused(open, "/proc/self/environ"),
    "files can be written": is_refused(os.open, "/tmp", os.O_TMPFILE | os.O_WRONLY),
    "sockets can be made": is_refused(socket.socket),
    "processes can be made": is_refused(os.fork),
    "other processes get signals": is_refused(os.kill, os.getppid() or 2, 0),
    "programs run as root": os.getuid() != 0,
}.items() if not holds) or "all holds")
"""


class Sandbox:
    """A jail and a bound on how many programs run in it at once; see the module.

    It belongs to no event loop, and may be used from one after the other. It is closed by `close`,
    by the end of a `with`, or when nothing refers to it any more.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        max_programs: int | None = None,
        backend: Backend | None = None,
    ) -> None:
        """At most `max_programs` at once: by default as many as there are processors.

        Raises `ConfigError` for fewer than one.
        """
        if max_programs is not None and max_programs < 1:
            raise ConfigError(f"is {max_programs}; it must be 1 or more", field="max_programs")
        self.limits = limits or Limits()
        self._max_programs = max_programs or os.cpu_count() or 1
        self._backend = backend
        self._jail: Jail | None = None
        self._closer: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()
        self._slots: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def start(self) -> Jail:
        """The jail; built, and tried by a harmless program, unless it stands.

        Raises `SandboxUnavailableError` where there can be none.
        """
        jail = self._jail
        if jail is None:
            jail = await asyncio.to_thread(self._open)
        return jail

    def close(self) -> None:
        """End the jail and all programs in it."""
        with self._lock:
            self._jail = None
            if self._closer is not None:
                self._closer()

    async def run(
        self, source: str, *, stdin: str = "", limits: Limits | None = None
    ) -> ProgramResult:
        """Run a program of Python with that standard input."""
        job = {"source": source, "function": None, "arguments": []}
        return await self._run(job, stdin, limits or self.limits)

    async def call(
        self,
        source: str,
        function: str,
        calls: Sequence[Sequence[Any]],
        *,
        limits: Limits | None = None,
    ) -> ProgramResult:
        """Run a program, then call a function of it, once for each list of arguments (JSON).

        A function that is none of the module is looked for in a class `Solution`. All calls are of
        one process and share the limits.
        """
        job = {"source": source, "function": function, "arguments": list(calls)}
        return await self._run(job, "", limits or self.limits)

    def _open(self) -> Jail:
        with self._lock:
            if self._jail is None:
                try:
                    jail = open_jail(self._backend, _probe)
                except SandboxUnavailableError as error:
                    if self._closer is None:
                        raise
                    # One stood here before: this machine can have one, but not just now.
                    raise _failed(str(error)) from error
                self._closer = weakref.finalize(self, close_jail, jail.process, jail.control)
                _logger.info("programs run in %s", jail)
                self._jail = jail
            return self._jail

    async def _run(self, job: dict[str, Any], stdin: str, limits: Limits) -> ProgramResult:
        async with self._slots_here():
            jail = await self.start()
            try:
                return await _Execution(jail, job, stdin, limits).result()
            except _JailEndedError as error:
                self._give_up(jail)
                raise _failed(f"the jail has ended ({error})") from error
            except OSError as error:
                raise _failed(f"the program could not be started ({error})") from error

    def _slots_here(self) -> asyncio.Semaphore:
        """What bounds the programs of the running event loop; semaphores cannot change loops."""
        loop = asyncio.get_running_loop()
        if loop not in self._slots:
            for ended in [each for each in self._slots if each.is_closed()]:
                del self._slots[ended]
            self._slots[loop] = asyncio.Semaphore(self._max_programs)
        return self._slots[loop]

    def _give_up(self, jail: Jail) -> None:
        with self._lock:
            if self._jail is jail:
                self._jail = None
                if self._closer is not None:
                    self._closer()


class _JailEndedError(OSError):
    """Nothing more is to be heard of a jail."""


class _Execution:
    """One program: its files in memory, and the socket on which its end is told."""

    def __init__(self, jail: Jail, job: dict[str, Any], stdin: str, limits: Limits) -> None:
        self._jail, self._limits = jail, limits
        self._files: list[int] = []
        self._reply, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._num_calls = len(job["arguments"])
        self._inputs = (stdin.encode(errors="replace"), json.dumps(job).encode())

    async def result(self) -> ProgramResult:
        """Send it, wait for it, and read what it left. If this is cancelled, it is killed."""
        try:
            self.send()
            patience_s = self._limits.wall_s + _GRACE_S
            try:
                message = await asyncio.wait_for(self._told(), patience_s)
            except TimeoutError as error:
                raise _JailEndedError(f"no answer in {patience_s:g} s") from error
            return self.read(message)
        finally:
            self.close()

    def send(self) -> None:
        """Make the files, and hand them to the jail."""
        stdin, job = self._inputs
        for name, content in (
            ("stdin", stdin),
            ("stdout", b""),
            ("stderr", b""),
            ("results", b""),
            ("job", job),
        ):
            self._files.append(os.memfd_create(name))
            _write(self._files[-1], content)
        os.lseek(self._files[0], 0, os.SEEK_SET)
        message = json.dumps(asdict(self._limits)).encode()
        try:
            socket.send_fds(self._jail.control, [message], [*self._files, self._other.fileno()])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise _JailEndedError("it does not listen") from error
        self._other.close()  # so that the jail's end is the only one

    async def _told(self) -> bytes:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._reply, lambda: None if told.done() else told.set_result(None))
        try:
            await told
        finally:
            loop.remove_reader(self._reply)
        return self._reply.recv(4096)

    def wait(self) -> bytes:
        """The same without an event loop."""
        self._reply.settimeout(self._limits.wall_s + _GRACE_S)
        return self._reply.recv(4096)

    def read(self, message: bytes) -> ProgramResult:
        """The result that a report and the files make."""
        if not message:
            raise _JailEndedError("it closed the connection")
        report = json.loads(message)
        if report["failure"] is not None:
            raise _failed(f"the program could not be started ({report['failure']})")
        status = report["exit_status"]
        stdout, stderr, results = (self._content(place) for place in (1, 2, 3))
        limit = self._limits.output_bytes
        ending = Ending.OK if status == 0 else Ending.ERROR
        if report["is_timed_out"]:
            ending = Ending.TIMEOUT
        elif status == -_SIGKILL:
            if report["cpu_s"] < _KILLED_FOR_TIME * self._limits.cpu_s:
                raise _failed("the program was killed from outside, perhaps for lack of memory")
            ending = Ending.TIMEOUT
        elif any(len(text) >= limit for text in (stdout, stderr, results)):
            ending = Ending.OUTPUT
        return ProgramResult(
            ending=ending,
            exit_status=status,
            stdout=stdout.decode(errors="replace"),
            stderr=stderr.decode(errors="replace"),
            results=tuple(_read_results(results, self._num_calls)),
            cpu_s=report["cpu_s"],
        )

    def _content(self, place: int) -> bytes:
        return os.pread(self._files[place], self._limits.output_bytes, 0)

    def close(self) -> None:
        """Close everything; the jail kills a program that nobody waits for."""
        self._other.close()
        self._reply.close()
        for file in self._files:
            os.close(file)
        self._files.clear()


def _probe(jail: Jail) -> None:
    """Have a program try what the jail must refuse; `JailError` where it does not."""
    job = {"source": _PROBE, "function": None, "arguments": []}
    execution = _Execution(jail, job, "", Limits())
    try:
        execution.send()
        result = execution.read(execution.wait())
    except (OSError, RolloutFailedError) as error:
        raise JailError(f"{jail} runs no program ({error})") from error
    finally:
        execution.close()
    if result.stdout != "all holds\n":
        lines = (result.stdout + result.stderr).splitlines() or [result.ending]
        raise JailError(f"{jail} does not hold: {', '.join(lines[:7])}")


def _write(file: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(file, view) :]


def _read_results(written: bytes, num_calls: int) -> list[tuple[Any, ...]]:
    """The result of each call. A program may write millions of lines; no more are read."""
    found: list[tuple[Any, ...]] = []
    for line in written.split(b"\n", num_calls)[:-1]:
        value: Any = None
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
        found.append(tuple(value) if isinstance(value, list) and len(value) <= 1 else ())
    return found


def _failed(message: str) -> RolloutFailedError:
    return RolloutFailedError(FailureKind.ENVIRONMENT, f"sandbox: {message}")
