"""A recorded function played again is the function."""

import subprocess
import sys

import pytest
import torch

from nemotron3.ops.conv import causal_conv
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.graph import Graph, can_record
from nemotron3.ops.linear import linear
from nemotron3.ops.native import Program, calls
from nemotron3.ops.norm import rms_norm
from nemotron3.ops.routing import route
from nemotron3.ops.segments import Segments
from tests.ops.native import needs_compiler

pytestmark = needs_compiler


@pytest.fixture(autouse=True, params=["a thread", "a team"])
def _team(request, monkeypatch):
    """The work is too small for more than one thread, but must be right with more."""
    if request.param == "a team":
        monkeypatch.setattr(calls, "WORK_PER_THREAD", 1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def mixture(x, weight, matrix, up, down):
    """Compiled operations with PyTorch's before, between and behind them."""
    x = rms_norm((x * 2).cos(), weight, 1e-5)
    logits = linear(x, matrix)
    indices, weights, _ = route(
        logits, weight[:8], choices=3, scoring="sigmoid", normalise=True, scale=2.5
    )
    y = routed_experts(x, indices, weights, up, down, activation="relu2")
    return torch.cat([x + y, logits], dim=-1).sin(), indices


def drawn(rows, seed):
    return torch.randn(rows, 24, generator=torch.Generator().manual_seed(seed))


WEIGHTS = [drawn(1, 1)[0], drawn(8, 2), drawn(8 * 16, 3).view(8, 16, 24), drawn(192, 4)]
WEIGHTS[3] = WEIGHTS[3].view(8, 24, 24)[:, :, :16].contiguous()


@pytest.mark.parametrize("rows", [1, 5, 30])
def test_a_replay_is_the_function_of_what_its_inputs_hold(rows):
    """With few rows and many, any choice of experts, on one thread and on three."""
    x, graph = drawn(rows, 5), Graph()
    with graph.record():
        results = mixture(x, *WEIGHTS)
    threads = torch.get_num_threads()
    try:
        for seed in range(6, 12):
            torch.set_num_threads(1 + 2 * (seed % 2))
            x.copy_(drawn(rows, seed))
            graph.replay()
            for mine, wanted in zip(results, mixture(x, *WEIGHTS), strict=True):
                assert torch.equal(mine, wanted)
    finally:
        torch.set_num_threads(threads)


def test_recording_runs_the_function_as_well():
    x, graph = drawn(2, 5), Graph()
    with graph.record():
        results = mixture(x, *WEIGHTS)
    for mine, wanted in zip(results, mixture(x, *WEIGHTS), strict=True):
        assert torch.equal(mine, wanted)


def test_what_is_written_in_place_is_written_again():
    x, total, graph = drawn(2, 5), torch.zeros(2, 24), Graph()
    with graph.record():
        total += x
        total[1, :7].fill_(3)
    for _ in range(3):
        graph.replay()
    assert torch.equal(total[0], x[0] + x[0] + x[0] + x[0])
    assert (total[1, :7] == 3).all()


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool((x > 0).any()), lambda x: x.nonzero()]
)
def test_deciding_by_a_value_is_refused(read):
    with pytest.raises(RuntimeError, match="reads the value of a tensor"), Graph().record():
        read(drawn(2, 5))


def test_what_no_team_can_do_is_refused():
    """A convolution over whole sequences starts its own threads and cannot be recorded."""
    x, weight = torch.randn(40, 6), torch.randn(6, 4)
    with pytest.raises(RuntimeError, match="cannot be recorded"), Graph().record():
        causal_conv(x, weight, None, segments=Segments([40]))


def test_float32_and_bfloat16_on_the_cpu_can_be_recorded():
    assert can_record([torch.float32, torch.bfloat16], torch.device("cpu"))
    assert not can_record([torch.float32, torch.float64], torch.device("cpu"))
    assert not can_record([torch.float32], torch.device("meta"))


def test_recording_does_not_load_the_compiler():
    """PyTorch's takes seconds to load, for which a first answer would wait."""
    program = """
import sys
import torch
from nemotron3.ops.graph import Graph

with torch.inference_mode(), Graph().record():
    torch.zeros(4).cos().split([1, 3])
assert "torch._dynamo" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()[-2000:]


def test_a_team_is_as_large_as_its_work_is_worth(monkeypatch):
    monkeypatch.setattr(calls, "WORK_PER_THREAD", 24 * 192 * 5)
    x, weight = drawn(5, 7), WEIGHTS[3].view(-1, 24)[:128].contiguous()

    def num_threads(products):
        graph = Graph()
        with graph.record():
            for _ in range(products):
                linear(x, weight)
        (program,) = graph._steps
        assert isinstance(program, Program)
        return program.num_threads

    assert [num_threads(products) for products in (1, 2, 3, 6)] == [1, 1, 2, 4]
