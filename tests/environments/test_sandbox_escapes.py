"""No program gets out of the sandbox, or a reward that it has not earned."""

import asyncio
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from nemotron3.environments import make_row
from nemotron3.environments.code import Code
from nemotron3.environments.response import TaskResponse
from nemotron3.environments.sandbox import Backend, Ending, Limits, Sandbox
from nemotron3.text import AssistantMessage
from tests.environments.escapes import ESCAPES, PRELUDE, RESOURCES, SLEEPERS, WORKS_OUTSIDE
from tests.environments.processes import descendants, exist, until

SECRET = "SECRET-" + "0123456789abcdef"
LIMITS = Limits(cpu_s=1, wall_s=4, memory_bytes=128 << 20, output_bytes=1 << 18)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")


class Host:
    """What a program could harm or reach: a file, a folder, a process, sockets."""

    def __init__(self, folder):
        self.folder = folder
        self.canary = folder / "canary"
        self.canary.write_text(SECRET)
        self.canary.chmod(0o666)
        folder.chmod(0o777)
        self.victim = subprocess.Popen(["sleep", "600"])
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.tcp.setblocking(False)
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.unix.bind(f"\0nemotron3-{os.getpid()}")
        self.unix.setblocking(False)
        os.environ["SANDBOX_TEST_KEY"] = SECRET

    def told(self, source):
        """A program with the host's names filled in."""
        names = {
            "CANARY": str(self.canary),
            "FOLDER": str(self.folder),
            "PORT": self.tcp.getsockname()[1],
            "HOST_PID": self.victim.pid,
        }
        lines = [f"{name} = {value!r}" for name, value in names.items()]
        return "\n".join([PRELUDE, *lines, source])

    def check(self):
        """Nothing has happened to it."""
        assert self.victim.poll() is None
        assert self.canary.read_text() == SECRET
        assert [path.name for path in self.folder.iterdir()] == ["canary"]
        assert self.canary.stat().st_mode & 0o777 == 0o666
        with pytest.raises(BlockingIOError):
            self.tcp.accept()
        with pytest.raises(BlockingIOError):
            self.unix.recv(1)

    def close(self):
        self.victim.kill()
        self.victim.wait()
        self.tcp.close()
        self.unix.close()
        del os.environ["SANDBOX_TEST_KEY"]


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module", params=list(Backend))
def sandbox(request):
    if request.param is Backend.BUBBLEWRAP and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    made = Sandbox(limits=LIMITS, backend=request.param)
    asyncio.run(made.start())
    yield made
    made.close()


def state():
    """What a program might leave on the machine."""
    places = ("/dev/shm", "/tmp", os.getcwd())
    return {place: set(os.listdir(place)) for place in places if os.path.isdir(place)}


def ours(before, after):
    """Names that are new, without those of tests that run beside this one."""
    return {
        name
        for place in after
        for name in after[place] - before.get(place, set())
        if name in ("x", "link", "planted.py", "new-w", "core") or name.startswith("core.")
    }


def reward_and_run(sandbox, source):
    """The reward of a program where the secret is expected of it, and what it printed."""

    async def judge():
        code = Code(sandbox=sandbox)
        tests = {"inputs": ["1", "2"], "outputs": [f'"{SECRET}"'] * 2, "fn_name": "f"}
        row = make_row("code", "?", verifier_metadata={"unit_tests": tests})
        answer = AssistantMessage(content=f"```python\n{source}\n```")
        verification = await code.verify(row, TaskResponse.of(answer), None)
        return verification, await sandbox.run(source)

    return asyncio.run(judge())


def escape_params():
    """Those that run into the limit of time are slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if name in RESOURCES else [])
        for name in ESCAPES
    ]


@pytest.mark.parametrize("name", escape_params())
def test_an_escape_earns_nothing_and_does_no_harm(name, sandbox, host):
    before = state()
    beside = descendants(os.getpid())
    verification, result = reward_and_run(sandbox, host.told(ESCAPES[name]))
    assert verification.reward == 0, verification
    assert "ESCAPED" not in result.stdout, result.stdout[:300]
    assert SECRET not in result.stdout
    host.check()
    assert descendants(os.getpid()) == beside
    assert not ours(before, state())
    again = asyncio.run(sandbox.run("print(1)"))
    assert (again.ending, again.stdout) == (Ending.OK, "1\n")


@pytest.mark.parametrize("name", WORKS_OUTSIDE)
def test_the_same_programs_succeed_outside(name, host):
    """What the sandbox is held to is not refused, or misspelled, everywhere."""
    done = subprocess.run(
        [sys.executable, "-c", host.told(ESCAPES[name])],
        capture_output=True,
        text=True,
        check=False,
        cwd=host.folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "ESCAPED" in done.stdout, done.stderr
    if name == "loopback":
        host.tcp.accept()[0].close()
    host.check()


@pytest.mark.slow
@pytest.mark.parametrize("name", SLEEPERS)
def test_a_program_that_waits_for_ever_is_ended(name, sandbox, host):
    beside = descendants(os.getpid())
    limits = Limits(cpu_s=1, wall_s=0.5)
    result = asyncio.run(sandbox.run(host.told(SLEEPERS[name]), limits=limits))
    assert result.ending is Ending.TIMEOUT
    host.check()
    assert descendants(os.getpid()) == beside


def test_there_are_many_of_them():
    assert len(ESCAPES) + len(SLEEPERS) >= 60


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_another_architecture_s_calls_kill(sandbox, host):
    for name in ("calls of another width", "calls of another architecture"):
        result = asyncio.run(sandbox.run(host.told(ESCAPES[name])))
        assert result.exit_status in (-signal.SIGSYS, -signal.SIGSEGV)


def test_the_hacks_are_sound_where_nothing_is_hidden(sandbox, host):
    """A program that knows the secret is rewarded: the zeros above have no other reason."""
    verification, result = reward_and_run(sandbox, host.told(f"f = lambda x: {SECRET!r}"))
    assert verification.reward == 1
    assert result.ending is Ending.OK


def test_a_program_leaves_nothing_to_the_next(sandbox):
    async def both():
        await sandbox.run("import builtins, sys; builtins.left_by_another = sys.left = 1")
        return await sandbox.run(
            "import builtins, sys\n"
            "print(hasattr(builtins, 'left_by_another'), hasattr(sys, 'left'))"
        )

    assert asyncio.run(both()).stdout == "False False\n"


def test_a_jail_leaves_no_process_behind():
    async def use():
        async with Sandbox(limits=LIMITS, max_programs=4) as sandbox:
            endless = [asyncio.create_task(sandbox.run("while True: pass")) for _ in range(3)]
            assert (await sandbox.run("print(1)")).stdout == "1\n"
            inside = descendants(os.getpid())
            for task in endless:
                task.cancel()
            await asyncio.gather(*endless, return_exceptions=True)
            return inside

    before = descendants(os.getpid())
    inside = asyncio.run(use())
    assert inside > before
    assert descendants(os.getpid()) == before
    until(lambda: not exist(inside - before))
