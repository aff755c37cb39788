"""What is freed is kept for what comes next, in every thread."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import contextlib, io, resource, sys, threading

way = sys.argv[1]
kept = None
if way in ("keep", "thread"):
    from nemotron3.runtime.malloc import retain_freed_memory
    kept = retain_freed_memory()
elif way == "command":
    from nemotron3.cli.main import main
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["info", "tiny"]) == 0

import torch  # NumPy, which it imports, starts threads

def fill():
    torch.empty(10 * 2**20).fill_(1.0)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    counts = []
    for _ in range(40):  # the first find the heap's end taken by small things and go beyond it
        before = faults()
        fill()
        counts.append(faults() - before)
    print(kept, min(counts))

if way in ("thread", "command"):
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
else:
    work()
"""


def faults(way, **settings):
    """Whether memory is kept, and the fewest pages that were fetched for tensors of one size."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, way]
    run = subprocess.run(command, env=plain | settings, capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
class TestKeptMemory:
    def test_it_is_fetched_for_every_tensor_else(self):
        pages = 10 * 2**20 * 4 // 2**16  # no page is larger than 64 KiB
        assert faults("plain")[1] > pages

    @pytest.mark.parametrize("way", ["keep", "thread"])
    def test_it_is_not_fetched_again(self, way):
        kept, count = faults(way)
        assert kept == "True"
        assert count < 100

    def test_a_command_keeps_it_for_the_threads_that_it_starts(self):
        assert faults("command")[1] < 100

    def test_whoever_has_set_up_the_allocator_is_left_alone(self):
        assert faults("keep", MALLOC_ARENA_MAX="3")[0] == "False"
