"""Teams of threads: those that nobody needs any more, and those that keep apart."""

import os
import subprocess
import sys

import pytest

from tests.ops.native import needs_compiler

PROGRAM = """
import os, sys, threading
import torch
from nemotron3 import LanguageModel
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.ops.linear import linear
from nemotron3.parallel.threads import release_team
from tests.tiny import tiny_config
from nemotron3.text import Tokenizer

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
model = LanguageModel.from_config(tiny_config("ME", vocab_size=300), seed=0)
tokenizer = Tokenizer.train(["some text"], vocab_size=288)
linear(torch.randn(300, 300), torch.randn(300, 300), backend="native")
with_team = threads()
if sys.argv[1] == "release":
    assert release_team()
    assert threads() == with_team - 2
    linear(torch.randn(300, 300), torch.randn(300, 300), backend="native")
    assert threads() == with_team
else:
    may_begin, work = threading.Event(), AsyncLLM._work
    AsyncLLM._work = lambda self: may_begin.wait() and work(self)
    llm = AsyncLLM(model, tokenizer=tokenizer)
    assert threads() == with_team - 2 + 1, "the engine's thread, without a team so far"
    may_begin.set()
    llm.close()
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is Linux's")
@pytest.mark.parametrize("way", ["release", "server"])
def test_a_team_is_given_back(way):
    command = [sys.executable, "-c", PROGRAM, way]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


SPREAD = """
import os, sys, threading
import torch
from nemotron3 import LanguageModel
from nemotron3.inference.async_llm import AsyncLLM
from nemotron3.ops import native
from nemotron3.parallel.threads import spread
from nemotron3.text import Tokenizer
from tests.tiny import tiny_config

processors = os.sched_getaffinity(0)

def places(threads):
    return [os.sched_getaffinity(thread) for thread in threads]

if sys.argv[1] == "fewer":
    torch.set_num_threads(1)
    assert not spread(native.team_ids())
    assert not spread(range(len(processors) + 1))
    assert places([0]) == [processors]
elif sys.argv[1] == "all":
    torch.set_num_threads(len(processors))
    team = native.team_ids()
    assert len(set(team)) == len(processors)
    assert spread(team)
    assert sorted(map(tuple, places(team))) == sorted((p,) for p in processors)
    assert native.team_ids() == team
else:
    torch.set_num_threads(len(processors))
    model = LanguageModel.from_config(tiny_config("ME", vocab_size=300), seed=0)
    llm = AsyncLLM(model, tokenizer=Tokenizer.train(["some text"], vocab_size=288))
    (engine,) = [t.native_id for t in threading.enumerate() if t.name == "engine"]
    while len(places([engine])[0]) > 1:
        pass
    assert places([0]) == [processors], "the event loop goes where there is room"
    llm.close()
"""


@needs_compiler
@pytest.mark.timeout(120)
@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="a team has one thread here",
)
@pytest.mark.parametrize("way", ["fewer", "all", "server"])
def test_a_team_as_large_as_the_machine_keeps_apart(way):
    command = [sys.executable, "-c", SPREAD, way]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
