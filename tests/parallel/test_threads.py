"""Teams of threads that nobody needs any more."""

import subprocess
import sys

import pytest

from tests.ops.native import needs_compiler

PROGRAM = """
import os, sys
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
    llm = AsyncLLM(model, tokenizer=tokenizer)
    assert threads() == with_team - 2 + 1, "the engine's thread, without a team so far"
    llm.close()
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is Linux's")
@pytest.mark.parametrize("way", ["release", "server"])
def test_a_team_is_given_back(way):
    command = [sys.executable, "-c", PROGRAM, way]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
