"""Teams of threads: their owners, how they wait and their size, which never affects results."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from nemotron3 import EngineConfig, LanguageModel, ModelConfig, SamplingParams
from nemotron3.inference.engine import Engine
from nemotron3.inference.sequences import EngineRequest
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.ops.native import NativeFunction, calls
from nemotron3.training.optimizers import AdamWConfig, build_optimizer
from nemotron3.training.step import TrainingStep
from tests.ops.native import needs_compiler
from tests.tiny import tokens_for
from tests.training.batches import documents, pack, pretraining

pytestmark = [needs_compiler, pytest.mark.timeout(240)]

START = """
import os, sys, threading, time
import torch
from nemotron3.ops.linear import linear

x, weight = torch.randn(300, 300), torch.randn(300, 300)

def compute():
    return linear(x, weight, backend="native")

def threads():
    return len(os.listdir("/proc/self/task"))

def wait_for(condition):
    while not condition():  # a test has a time limit
        time.sleep(0.01)

compute()  # PyTorch is given as many threads as there are processors
torch.set_num_threads(3)
"""


def run(program: str) -> None:
    command = [sys.executable, "-c", START + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_team_belongs_to_the_thread_that_computes_and_ends_with_it():
    run("""
before = threads()
compute()
compute()
assert threads() >= before + 1
before, may_end, computed = threads(), threading.Event(), threading.Event()

def other():
    compute()
    computed.set()
    may_end.wait()

thread = threading.Thread(target=other)
thread.start()
computed.wait()
assert threads() >= before + 1 + 2
may_end.set()
thread.join()
wait_for(lambda: threads() <= before)
""")


def test_helpers_sleep_while_there_is_nothing_to_do():
    run("""
compute()
time.sleep(0.2)
used = time.process_time()
time.sleep(1.0)
assert time.process_time() - used < 0.5
""")


@pytest.mark.long
def test_a_contended_team_leaves_pytorchs_threads_and_comes_back_to_them():
    """Those then sleep at once instead of spinning, as long as there is a larger idle team."""
    run("""
import subprocess

# More threads than processors keep each other out even where nobody else computes.
count = max(2, len(os.sched_getaffinity(0)))
torch.set_num_threads(count)
expected = compute()
alone = threads()
idle_team = os.cpu_count() + 1
busy = [
    subprocess.Popen([sys.executable, "-c", "while True: pass"])
    for _ in range(2 * len(os.sched_getaffinity(0)))
]

def computes():
    assert torch.equal(compute(), expected)
    return threads()

try:
    while computes() < alone + idle_team:
        pass
finally:
    for program in busy:
        program.kill()
        program.wait()
helpers = count - 1
while computes() > alone + helpers:
    pass
""")


def test_helpers_go_where_their_caller_may_go():
    """None is bound to a processor, where another engine's may have been put as well."""
    run("""
compute()
for thread in os.listdir("/proc/self/task"):
    assert os.sched_getaffinity(int(thread)) == os.sched_getaffinity(0)
""")


def test_a_forked_child_has_a_team_of_its_own():
    """The runtime of PyTorch's threads does not work in such a child; its own operations hang."""
    run("""
expected = compute().numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if {compute().numpy().tobytes() for _ in range(3)} == {expected} else 1)
assert os.waitpid(child, 0)[1] == 0
assert compute().numpy().tobytes() == expected
""")


SIZE = """
#include "team.cpp"
// The sizes that a team of `wanted` has after each of n measurements of 20 milliseconds, of which
// threads work and are kept out as `worked` and `kept_out` say for each size.
extern "C" void sizes(int64_t wanted, const double* worked, const double* kept_out, int64_t* sizes,
                      int64_t n, int64_t threads) {
  Size size(wanted);
  const int64_t step = 20 * MILLISECOND;
  for (int64_t i = 0; i < n; i++) {
    const int64_t now = size.threads();
    size.learn({step, (int64_t)(worked[now] * step), (int64_t)(kept_out[now] * step)},
               (i + 1) * step);
    sizes[i] = size.threads();
  }
}
"""


@pytest.fixture
def sizes(tmp_path):
    source = tmp_path / "size.cpp"
    source.write_text(SIZE)
    function = NativeFunction(source, "sizes", "i ppp i")

    def call(wanted: int, worked: dict[int, float], kept_out: dict[int, float]) -> list[int]:
        tables = torch.zeros(2, wanted + 1, dtype=torch.float64)
        for table, values in zip(tables, (worked, kept_out), strict=True):
            for size, value in values.items():
                table[size] = value
        result = torch.zeros(400, dtype=torch.int64)
        function(wanted, tables[0], tables[1], result, len(result))
        return result.tolist()

    return call


def test_a_team_that_is_left_alone_stays_whole(sizes):
    assert set(sizes(2, {1: 1.0, 2: 1.2}, {2: 0.01})) == {2}


def test_a_team_that_loses_by_waiting_becomes_smaller_and_seldom_tries_again(sizes):
    found = sizes(2, {1: 0.9, 2: 0.6}, {1: 0.1, 2: 0.9})
    assert found[:2] == [1, 1]
    assert found.count(2) < 20
    assert 2 in found[20:]
    assert 2 not in found[-20:]


def test_a_team_that_gains_in_spite_of_others_stays(sizes):
    found = sizes(2, {1: 1.0, 2: 1.4}, {1: 0.0, 2: 0.5})
    assert found.count(1) < 20


def test_a_large_team_gives_up_the_threads_that_have_no_processor(sizes):
    found = sizes(8, {n: (n if n < 7 else 4.0) for n in range(1, 9)}, {7: 1.0, 8: 1.9})
    assert set(found[-20:]) == {6}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.from_config(ModelConfig.preset("tiny"), seed=0)


@pytest.fixture
def in_teams(monkeypatch):
    """The results of a function in teams of one, two and three threads, of a caller each.

    PyTorch has one thread for its own operations, whose sums do depend on their number.
    """

    def call(function) -> list:
        results = []
        for count in (1, 2, 3):
            monkeypatch.setattr(calls, "_num_threads", lambda count=count: count)
            with ThreadPoolExecutor(1) as pool:
                results.append(pool.submit(function).result())
        return results

    return call


def test_training_has_the_same_bits_in_teams_of_any_size(model, in_teams):
    """Every operation of a training step, forward and backward."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = pack(documents(300, 1, 130, seed=1, vocabulary=model.config.vocab_size))

    def train():
        model.load_state_dict(start)
        optimizer = build_optimizer(model, AdamWConfig(lr=1e-3))
        update = TrainingStep(model, optimizer, pretraining(model), clip_grad_norm=1.0)
        metrics = [update([batch], learning_rate=1e-3) for _ in range(2)]
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        return metrics, state | {f"gradient of {name}": grad for name, grad in gradients.items()}

    (metrics, tensors), *others = in_teams(train)
    for their_metrics, theirs in others:
        assert their_metrics == metrics
        for name, tensor in tensors.items():
            assert torch.equal(theirs[name], tensor), name
    model.load_state_dict(start)


@pytest.mark.parametrize("state", [StatePrecision(), StatePrecision(ssm="float16")])
def test_answers_have_the_same_bits_in_teams_of_any_size(model, in_teams, state):
    """Prompts, steps of one row and of many, drafts, and drawn tokens."""
    config = EngineConfig(max_num_seqs=9, max_model_len=600, adapts_drafts=False, state=state)
    params = SamplingParams(max_tokens=8, temperature=0.9, seed=3, ignore_eos=True, logprobs=2)

    def answer():
        engine = Engine(model, config)
        results = []
        for lengths in ((400,), (3, 50, 1, 130, 17, 2, 64, 9, 33)):
            for place, length in enumerate(lengths):
                prompt = tuple(tokens_for(model.config, length, seed=place).tolist())
                name = f"{len(lengths)}.{place}"
                own = replace(params, temperature=0.0 if place % 2 else 0.9)
                engine.add(EngineRequest(request_id=name, prompt=prompt, params=own))
            while engine.has_work:
                results += [(p.request_id, p.tokens, p.logprobs) for p in engine.step()]
        return results

    alone, two, three = in_teams(answer)
    assert len(alone) > 10
    assert alone == two == three
