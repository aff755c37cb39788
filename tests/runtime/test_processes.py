"""Processes that work for another one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron3.runtime.processes import end, spawn

KILLED = """
import sys, time
from tests.runtime.test_processes import begin_work
if __name__ == "__main__":
    begin_work(sys.argv[1])
    time.sleep(600)
"""


def work(socket, file, depth):
    """Busy in a loop that reads no socket, after `depth` processes that work for it have begun."""
    if depth:
        begin_work(file, depth - 1)
    with open(file, "a", encoding="utf-8") as out:
        out.write(f"{os.getpid()}\n")
    socket.send("begun")
    while True:
        time.sleep(0.01)


def begin_work(file, depth=1):
    """Start it, and wait until it has begun."""
    process, socket = spawn(work, file, depth, name="work")
    assert socket.recv() == "begun"
    return process, socket


def is_running(pid):
    """Not a zombie, either."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pids):
    """Fails after a time that no machine needs."""
    until = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < until, f"still running: {[*filter(is_running, pids)]}"
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes by /proc")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_they_end_when_the_process_that_they_work_for_is_killed(tmp_path, signum):
    """At once, in the middle of their work, and so do those that work for them."""
    script, file = tmp_path / "killed.py", tmp_path / "pids"
    script.write_text(KILLED, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, str(script), str(file)], env=env)
    try:
        until = time.monotonic() + 120
        while not file.exists() or len(file.read_text("utf-8").split()) < 2:
            assert parent.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        pids = [int(pid) for pid in file.read_text("utf-8").split()]
        assert all(map(is_running, pids))
        parent.send_signal(signum)
        wait_until_ended(pids)
    finally:
        parent.kill()
        parent.wait()


def test_one_that_is_told_to_end_has_ended(tmp_path):
    file = tmp_path / "pids"
    process, socket = begin_work(str(file), depth=0)
    socket.close()
    end(process)
    assert not process.is_alive()
    wait_until_ended([int(pid) for pid in file.read_text("utf-8").split()])
