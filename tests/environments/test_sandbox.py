"""The sandbox runs programs, tells how they ended, and tells its own failures from theirs."""

import asyncio
import gc
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from nemotron3.environments import FailureKind, RolloutFailedError
from nemotron3.environments.sandbox import (
    Backend,
    Ending,
    Limits,
    Sandbox,
    SandboxUnavailableError,
)
from nemotron3.environments.sandbox.backends import bubblewrap_command
from nemotron3.environments.sandbox.sandbox import _read_results
from nemotron3.errors import ConfigError
from tests.environments.processes import descendants, exist, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


@pytest.fixture(scope="module")
def sandbox():
    made = started(limits=Limits(cpu_s=1, wall_s=10))
    yield made
    made.close()


def run(sandbox, source, **options):
    return asyncio.run(sandbox.run(source, **options))


def call(sandbox, source, function, *calls):
    return asyncio.run(sandbox.call(source, function, calls))


def started(**options):
    """A sandbox with its jail, and which processes that jail consists of."""
    sandbox = Sandbox(**options)
    jail = asyncio.run(sandbox.start())
    # The jail of a failed attempt, or its probe, may be on their way out.
    run(sandbox, "")
    sandbox.idle = descendants(jail.process.pid)
    return sandbox


def programs(sandbox):
    """The processes of programs that run in a jail."""
    return descendants(sandbox._jail.process.pid) - sandbox.idle


def test_standard_streams_and_status(sandbox):
    result = run(
        sandbox,
        "import sys\n"
        "for line in sys.stdin: print(line.strip()[::-1])\n"
        "print('no', file=sys.stderr)",
        stdin="añb\n💥x\n",
    )
    assert (result.ending, result.exit_status) == (Ending.OK, 0)
    assert (result.stdout, result.stderr) == ("bña\nx💥\n", "no\n")
    assert run(sandbox, "print(input(), end='|'); print(input())", stdin="1\n2").stdout == "1|2\n"
    assert run(sandbox, "import os; os.write(1, b'\\xff!')").stdout == "\ufffd!"
    assert run(sandbox, "print(open(0).read())", stdin="x\n" * 9999).stdout == "x\n" * 9999 + "\n"
    assert run(sandbox, "", stdin="unread" * 9999).ending is Ending.OK


ENDINGS = {
    "raise SystemExit": (Ending.OK, 0),
    "exit(0)": (Ending.OK, 0),
    "quit(7)": (Ending.ERROR, 7),
    "exit('text')": (Ending.ERROR, 1),
    "1/0": (Ending.ERROR, 1),
    "raise KeyboardInterrupt": (Ending.ERROR, 1),
    "input()": (Ending.ERROR, 1),
    "if": (Ending.ERROR, 1),
    "\0": (Ending.ERROR, 1),
    "import os; os._exit(3)": (Ending.ERROR, 3),
    "import ctypes; ctypes.string_at(1)": (Ending.ERROR, -signal.SIGSEGV),
    "x = bytearray(1 << 40)": (Ending.ERROR, 1),
    "import sys; sys.stdout.close()": (Ending.ERROR, 120),
}


@pytest.mark.parametrize("source", ENDINGS)
def test_endings(sandbox, source):
    result = run(sandbox, source)
    assert (result.ending, result.exit_status) == ENDINGS[source]


def test_what_was_printed_before_an_error_is_kept(sandbox):
    result = run(sandbox, "print('so far')\ndef g(): 1/0\ng()")
    assert result.stdout == "so far\n"
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert 'File "program.py", line 2, in g' in result.stderr


def test_too_much_output_and_too_little_time(sandbox):
    small = Limits(output_bytes=1000)
    result = run(sandbox, "while True: print('x' * 99)", limits=small)
    assert (result.ending, len(result.stdout)) == (Ending.OUTPUT, 1000)
    fits = run(sandbox, "print('x' * 998)", limits=small)
    assert (fits.ending, len(fits.stdout)) == (Ending.OK, 999)
    slept = run(sandbox, "import time; time.sleep(999)", limits=Limits(wall_s=0.2))
    assert slept.ending is Ending.TIMEOUT


def test_the_whole_standard_library_is_there(sandbox):
    names = "sqlite3 zlib hashlib ssl ctypes decimal asyncio email.mime.text tomllib zoneinfo wave"
    assert run(sandbox, f"import {names.replace(' ', ', ')}; print('all')").stdout == "all\n"
    source = "import sqlite3; print(*sqlite3.connect(':memory:').execute('select 6*7'))"
    assert run(sandbox, source).stdout == "(42,)\n"


def test_sets_have_one_order(sandbox):
    source = "print({'a', 'b', 'c', 'd', 'e', 'f'})"
    other = Sandbox()
    assert run(sandbox, source).stdout == run(other, source).stdout
    other.close()


@pytest.mark.parametrize(
    ("written", "num_calls", "results"),
    [
        (b"[1]\n[2]\n", 2, [(1,), (2,)]),
        (b"[1]\n[2]\n[3]\n", 2, [(1,), (2,)]),
        (b"[1]\n[2", 2, [(1,)]),  # it ended within the second one
        (b"[1]\n[2]", 2, [(1,)]),
        (b"[1]\r[2]\n", 2, [()]),
        (b"", 2, []),
        (b"[1]\n", 0, []),
        (b"\xff\n[NaN\n[" + b"[" * 10**5 + b"\n[1, 2]\n{}\n", 9, [(), (), (), (), ()]),
        (b"\n" * 10**6, 3, [(), (), ()]),
    ],
)
def test_results_are_read_line_by_line_and_no_more_than_the_calls(written, num_calls, results):
    assert _read_results(written, num_calls) == results


def test_calls(sandbox):
    source = "def f(a, b=2):\n    print('noise')\n    return a + b"
    result = call(sandbox, source, "f", [1, 5], [1], ["x", "y"], [[1], [2]], [1, "x"], [])
    assert result.results == ((6,), (3,), ("xy",), ([1, 2],), (), ())
    assert (result.ending, result.stdout) == (Ending.OK, "noise\n" * 5)
    assert call(sandbox, "f = lambda x: {'a': (x, None)}", "f", [1.5]).results == (
        ({"a": [1.5, None]},),
    )
    assert call(sandbox, "f = lambda: {1, 2}", "f", []).results == ((),)
    assert call(sandbox, "class Solution:\n    def f(self, x): return x", "f", [4]).results == (
        (4,),
    )
    missing = call(sandbox, "g = 1", "f", [])
    assert (missing.ending, missing.results) == (Ending.ERROR, ())
    flood = "import os\nos.write(3, b'\\n' * (1 << 19) + b'[7]\\n')\nf = lambda: 1"
    assert call(sandbox, flood, "f", [], []).results == ((), ())
    assert run(sandbox, flood).results == ()
    half = call(sandbox, "def f(x):\n    if x: exit(0)\n    return x", "f", [0], [1], [0])
    assert half.results == ((0,),)


def test_many_at_once_and_no_more_than_allowed():
    async def all_of_them():
        most, is_over = 0, False

        async def watch():
            nonlocal most
            while not is_over:
                most = max(most, len(programs(sandbox)))
                await asyncio.sleep(0)

        watching = asyncio.create_task(watch())
        found = await asyncio.gather(
            *(sandbox.run("print(int(input()) ** 2)", stdin=str(i)) for i in range(60))
        )
        is_over = True
        await watching
        return most, [int(result.stdout) for result in found]

    sandbox = started(max_programs=3)
    most, found = asyncio.run(all_of_them())
    assert found == [i**2 for i in range(60)]
    assert most <= 3
    sandbox.close()


def test_one_sandbox_serves_one_event_loop_after_the_other():
    sandbox = Sandbox(max_programs=1)

    async def some():
        found = await asyncio.gather(*(sandbox.run(f"print({i})") for i in range(4)))
        return [result.stdout for result in found]

    for _ in range(3):
        assert asyncio.run(some()) == ["0\n", "1\n", "2\n", "3\n"]
    assert len(sandbox._slots) == 1  # of the loops that have ended none is kept but the last
    sandbox.close()


def test_a_cancelled_program_is_killed(sandbox):
    async def cancel():
        task = asyncio.create_task(sandbox.run("while True: pass"))
        while not programs(sandbox):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    until(lambda: not programs(sandbox))
    assert run(sandbox, "print(1)").stdout == "1\n"


def test_a_program_that_something_else_killed_is_a_failure(sandbox):
    async def kill():
        task = asyncio.create_task(sandbox.run("import time; time.sleep(9)"))
        while not (found := programs(sandbox)):
            await asyncio.sleep(0.01)
        os.kill(found.pop(), signal.SIGKILL)
        await task

    with pytest.raises(RolloutFailedError, match="killed from outside") as caught:
        asyncio.run(kill())
    assert caught.value.failure.kind is FailureKind.ENVIRONMENT


def test_a_jail_that_dies_is_a_failure_and_is_replaced():
    before = descendants(os.getpid())
    sandbox = started()

    async def kill_jail():
        task = asyncio.create_task(sandbox.run("while True: pass"))
        while not programs(sandbox):
            await asyncio.sleep(0.01)
        for pid in sandbox.idle:
            with suppress(ProcessLookupError):  # one takes the others with it
                os.kill(pid, signal.SIGKILL)
        await task

    with pytest.raises(RolloutFailedError, match="the jail has ended"):
        asyncio.run(kill_jail())
    until(lambda: descendants(os.getpid()) == before)
    assert run(sandbox, "print(1)").stdout == "1\n"
    sandbox.close()
    assert descendants(os.getpid()) == before


def test_a_jail_that_cannot_be_replaced_is_a_failure(monkeypatch):
    sandbox = Sandbox(backend=Backend.LANDLOCK)
    run(sandbox, "")
    sandbox.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RolloutFailedError, match="no sandbox to run programs in"):
        run(sandbox, "")
    with pytest.raises(SandboxUnavailableError, match="No such file"):
        run(Sandbox(backend=Backend.LANDLOCK), "")


def test_a_host_without_descriptors_is_a_failure_and_keeps_the_jail(sandbox):
    jail = sandbox._jail
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def starved():
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 4, hard))
        try:
            await sandbox.run("")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with pytest.raises(RolloutFailedError, match="Too many open files"):
        asyncio.run(starved())
    assert run(sandbox, "print(1)").stdout == "1\n"
    assert sandbox._jail is jail


def test_a_jail_ends_with_its_sandbox_object():
    before = descendants(os.getpid())
    sandbox = Sandbox()
    run(sandbox, "")
    assert descendants(os.getpid()) > before
    del sandbox
    gc.collect()
    assert descendants(os.getpid()) == before


def test_a_jail_ends_when_its_host_is_killed():
    source = (
        "import asyncio\n"
        "from nemotron3.environments.sandbox import Sandbox\n"
        "asyncio.run(Sandbox().run('while True: pass'))"
    )
    host = subprocess.Popen([sys.executable, "-c", source])
    until(lambda: len(descendants(host.pid)) >= 2)
    inside = descendants(host.pid)
    host.kill()
    host.wait()
    until(lambda: not exist(inside))


def test_a_key_press_for_the_host_does_not_reach_the_jail(sandbox):
    assert os.getsid(sandbox._jail.process.pid) != os.getsid(0)


def test_a_backend_that_is_not_there_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailableError, match=r"bwrap is not installed.*apt install"):
        run(Sandbox(backend=Backend.BUBBLEWRAP), "")


def test_a_bubblewrap_that_fails_says_so_and_leaves_the_other(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: no permission' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SandboxUnavailableError, match="bubblewrap: bwrap: no permission"):
        run(Sandbox(backend=Backend.BUBBLEWRAP), "")
    sandbox = Sandbox()
    assert run(sandbox, "print(1)").stdout == "1\n"
    assert sandbox._jail.backend is Backend.LANDLOCK
    sandbox.close()


UNPROTECTED = """#!{python}
import json, os, socket, sys
control = socket.socket(fileno=int(sys.argv[-2]))
control.send(json.dumps(dict(landlock=0, namespaces=True)).encode())
while True:
    message, files, _, _ = socket.recv_fds(control, 4096, 6)
    if not message:
        break
    if (pid := os.fork()) == 0:
        os.dup2(files[1], 1)
        os.lseek(files[4], 0, 0)
        exec(json.loads(os.read(files[4], 1 << 20))["source"])
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)
    report = dict(failure=None, exit_status=0, is_timed_out=False, cpu_s=0)
    socket.socket(fileno=files[5]).send(json.dumps(report).encode())
"""


def test_a_jail_that_does_not_hold_is_refused(monkeypatch, tmp_path):
    lax = tmp_path / "bwrap"
    lax.write_text(UNPROTECTED.format(python=sys.executable), encoding="utf-8")
    lax.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    said = "does not hold: files can be read, .*sockets can be made, processes can be made"
    with pytest.raises(SandboxUnavailableError, match=said):
        run(Sandbox(backend=Backend.BUBBLEWRAP), "")


def test_the_command_line_of_bubblewrap():
    command = bubblewrap_command("/usr/bin/bwrap", ["python", "-c", "pass"])
    assert command[0] == "/usr/bin/bwrap"
    assert command[command.index("--") + 1 :] == ["python", "-c", "pass"]
    for option in ("--unshare-net", "--unshare-pid", "--unshare-ipc", "--new-session"):
        assert option in command
    assert command[command.index("--cap-drop") + 1] == "ALL"
    shown = [command[i + 1] for i, word in enumerate(command) if word == "--ro-bind"]
    assert not {"/", "/etc", "/root", "/home", "/tmp", "/usr", "/proc", "/dev"} & set(shown)
    assert not {"--bind", "--dev-bind", "--proc", "--dev", "--share-net"} & set(command)
    hidden = [command[i + 1] for i, word in enumerate(command) if word == "--tmpfs"]
    assert all(path.endswith("-packages") for path in hidden)
    kept = {command[i + 1] for i, word in enumerate(command) if word == "--cap-add"}
    assert kept == ({"CAP_SETUID", "CAP_SETGID", "CAP_KILL"} if os.geteuid() == 0 else set())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cpu_s": 0}, "cpu_s"),
        ({"wall_s": float("nan")}, "wall_s"),
        ({"memory_bytes": 1 << 20}, "memory_bytes"),
        ({"output_bytes": -1}, "output_bytes"),
    ],
)
def test_limits_that_nothing_could_keep_are_refused(options, field):
    with pytest.raises(ConfigError, match=field):
        Limits(**options)
    with pytest.raises(ConfigError, match="max_programs is 0"):
        Sandbox(max_programs=0)
