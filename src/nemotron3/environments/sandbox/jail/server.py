"""The process that programs are forked from. It never runs, and never reads, a program itself.

A program arrives as a message with descriptors: its files, and the socket on which its end is
reported. A closed socket says that nobody waits for it any more, and it is killed; so are all when
the control socket is closed, which is how a host that has died looks from here. A program has one
process (the filter refuses a second one), the first of a pid namespace where there are namespaces,
and dies with this one.

After the set-up the server answers "ready" and says what holds, or why it cannot.
"""

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from . import landlock, namespaces, preloaded, system
from .program import become_program, prepare

_MAX_MESSAGE = 4096
_NUM_DESCRIPTORS = 6
_MAX_PROC_ADJUSTMENT = b"1000"


@dataclass
class _Running:
    """A program: its process, the socket that waits for it, and what is known of its end."""

    pid: int
    pidfd: int
    reply: int
    ready: int
    deadline: float
    is_timed_out: bool = False


@dataclass
class Server:
    """Forks programs, kills those whose time is over or nobody waits for, and reports."""

    control: socket.socket
    fork: Callable[[], int]
    rules: int
    _by_pidfd: dict[int, _Running] = field(default_factory=dict[int, _Running])
    _by_reply: dict[int, _Running] = field(default_factory=dict[int, _Running])

    def run(self) -> None:
        """Until the control socket is closed."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll(self._patience_ms()):
                if descriptor == self.control.fileno():
                    if not self._start(poll):
                        self._kill_all()
                        return
                elif descriptor in self._by_pidfd:
                    self._finish(poll, self._by_pidfd[descriptor])
                elif descriptor in self._by_reply:  # its other end is closed
                    poll.unregister(descriptor)
                    _kill(self._by_reply[descriptor])
            now = time.monotonic()
            for running in self._by_pidfd.values():
                if running.deadline <= now and not running.is_timed_out:
                    running.is_timed_out = True
                    _kill(running)

    def _patience_ms(self) -> int | None:
        waiting = [each.deadline for each in self._by_pidfd.values() if not each.is_timed_out]
        return max(0, int(1000 * (min(waiting) - time.monotonic())) + 1) if waiting else None

    def _start(self, poll: select.poll) -> bool:
        """Fork the program of the next message; whether there was one."""
        message, descriptors, _, _ = socket.recv_fds(self.control, _MAX_MESSAGE, _NUM_DESCRIPTORS)
        if not message:
            return False
        *files, reply = descriptors
        ready, ready_of_child = os.pipe2(os.O_CLOEXEC)
        limits = json.loads(message)
        try:
            pid = self.fork()
        except OSError as error:
            _report(reply, failure=str(error))
            for each in (*descriptors, ready, ready_of_child):
                os.close(each)
            return True
        if pid == 0:
            _begin(files, ready_of_child, limits, self.rules)
        for each in (*files, ready_of_child):
            os.close(each)
        running = _Running(
            pid, os.pidfd_open(pid), reply, ready, time.monotonic() + limits["wall_s"]
        )
        self._by_pidfd[running.pidfd] = running
        self._by_reply[reply] = running
        poll.register(running.pidfd, select.POLLIN)
        poll.register(reply, 0)  # a hang-up is reported unasked
        return True

    def _finish(self, poll: select.poll, running: _Running) -> None:
        _, status, usage = os.wait4(running.pid, 0)
        said = os.read(running.ready, 1000)
        failure = None if said == b"1" else said.decode(errors="replace") or "it was killed"
        _report(
            running.reply,
            failure=failure,
            exit_status=os.waitstatus_to_exitcode(status),
            is_timed_out=running.is_timed_out,
            cpu_s=usage.ru_utime + usage.ru_stime,
        )
        poll.unregister(running.pidfd)
        with suppress(KeyError):  # where nobody waited any more
            poll.unregister(running.reply)
        del self._by_pidfd[running.pidfd], self._by_reply[running.reply]
        for each in (running.pidfd, running.reply, running.ready):
            os.close(each)

    def _kill_all(self) -> None:
        for running in self._by_pidfd.values():
            _kill(running)
            os.waitpid(running.pid, 0)


def _begin(files: list[int], ready: int, limits: dict[str, Any], rules: int) -> None:
    try:
        become_program(files, ready, limits, rules)
    except BaseException as error:  # noqa: BLE001  (nothing may go on as the server)
        for descriptor in (ready, 5):  # it may have been moved
            with suppress(OSError):
                os.write(descriptor, f"{type(error).__name__}: {error}"[:900].encode())
                break
    finally:
        os._exit(1)


def _kill(running: _Running) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(running.pidfd, signal.SIGKILL)


def _report(reply: int, **values: Any) -> None:
    with suppress(BrokenPipeError, ConnectionResetError), socket.socket(fileno=os.dup(reply)) as to:
        to.send(json.dumps(values).encode())


def main() -> None:
    """Set up as the arguments say, report, and serve."""
    descriptor, builds_namespaces = int(sys.argv[2]), sys.argv[3] == "namespaces"
    control = socket.socket(fileno=descriptor)
    sys.path[:] = [path for path in sys.path if path != sys.argv[1]]
    preloaded.load()
    fork, has_namespaces, why_not = os.fork, False, ""
    if builds_namespaces:
        with suppress(OSError), open("/proc/self/oom_score_adj", "wb") as file:
            file.write(_MAX_PROC_ADJUSTMENT)
        try:
            fork, has_namespaces = namespaces.enter(control).fork, True
        except OSError as error:
            why_not = str(error)
    rules = _rules()
    system.prctl(system.PR_SET_NO_NEW_PRIVS, 1)
    prepare()
    control.send(
        json.dumps(
            {
                "landlock": landlock.abi(),
                "namespaces": has_namespaces,
                "namespaces_refused": why_not,
            }
        ).encode()
    )
    Server(control, fork, rules).run()


def _rules() -> int:
    """The descriptor of Landlock's rules; of nothing where the kernel has no Landlock."""
    if not landlock.abi():
        return os.open(".", os.O_PATH | os.O_CLOEXEC)
    folders = namespaces.standard_library()
    return landlock.create_ruleset(folders, namespaces.standard_trees())
