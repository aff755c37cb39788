"""CUDA graphs of steps, with a double for the device: launches, padding, and no reads by the host.

The double repeats the function where a device would replay its launches. So it detects what a graph
may not do (decisions by values, other memory), and the arithmetic is that of the kernels, in
Triton's interpreter.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.inference.config import EngineConfig
from nemotron3.inference.engine import Engine
from nemotron3.inference.model_runner.model_runner import ModelRunner, padded_rows
from nemotron3.inference.requests import SamplingParams
from nemotron3.inference.sequences import EngineRequest
from nemotron3.ops import backends
from tests.inference.model_runner.test_model_runner import drawn, fed, plainly
from tests.tiny import qwen_config, tiny_config, tiny_model, tokens_for
from tests.tolerances import DECODE

CONFIG = tiny_config("MEM*E")
HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
"""What makes the host wait for a value, or shapes depend on one."""


class Watch(TorchDispatchMode):
    """Refuses operations that a capture would refuse."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in HOST, f"{func._schema.name} reads a value"
        return func(*args, **(kwargs or {}))


class Device:
    """The events of all pools of a test's runners."""

    def __init__(self):
        self.captures = self.replays = 0

    def pool(self, _device):
        return Pool(self)


class Pool:
    """Graphs that share memory: a replay overwrites the results of the others."""

    def __init__(self, device):
        self.device, self.graphs = device, []

    def capture(self, function):
        self.device.captures += 1
        with unlaunched(), Watch():
            self.graphs.append(Graph(self, function))
        return self.graphs[-1]


class Graph:
    def __init__(self, pool, function):
        self.pool, self.function, self.results = pool, function, function()

    def replay(self):
        self.pool.device.replays += 1
        for graph in self.pool.graphs:
            for result in graph.results:
                result.fill_(float("nan"))
        with Watch():
            again = self.function()
        for mine, new in zip(self.results, again, strict=True):
            mine.copy_(new)


@contextmanager
def unlaunched():
    """While a function is captured, kernels do nothing; their outputs are NaN."""
    from triton.runtime.interpreter import InterpretedFunction  # noqa: PLC0415 - with Triton

    launch = InterpretedFunction.run
    InterpretedFunction.run = lambda *_, **__: None
    try:
        yield
    finally:
        InterpretedFunction.run = launch


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Let all operations with a kernel use it."""
    monkeypatch.setattr(
        backends, "_fastest", lambda known, _: "triton" if "triton" in known else "torch"
    )
    with torch.inference_mode():
        yield


@pytest.fixture
def device():
    return Device()


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


def same(ours, theirs, assert_close):
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert_close(mine, other, DECODE)


@pytest.mark.usefixtures("poisoned_memory")
def test_steps_are_those_of_the_model(model, assert_close, device):
    ours, theirs = fed(model, [5, 1, 17, 70]), fed(model, [5, 1, 17, 70])
    runner = ModelRunner(model, ours, make_pool=device.pool)
    for seed, slots in enumerate([[0, 1, 2, 3], [2], [3, 1], [1, 3], [0, 1, 2, 3]]):
        tokens = drawn(len(slots), 1, seed)
        same(runner.decode(tokens, slots), plainly(model, theirs, tokens, slots), assert_close)
    assert ours.lengths == theirs.lengths
    assert (device.captures, device.replays) == (3, 5)


@pytest.mark.long
@pytest.mark.usefixtures("poisoned_memory")
def test_rows_are_padded_and_padding_leaves_everyone_alone(model, assert_close, device):
    lengths = [3 + i % 5 for i in range(18)]
    ours, theirs = fed(model, lengths), fed(model, lengths)
    runner = ModelRunner(model, ours, make_pool=device.pool)
    for seed, slots in enumerate([list(range(17)), list(range(17, 0, -1)), list(range(18))]):
        tokens = drawn(len(slots), 2, seed)
        out = runner.decode(tokens, slots)
        assert out.logits.shape == (len(slots), 2, CONFIG.vocab_size)
        same(out, plainly(model, theirs, tokens, slots), assert_close)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for a, b in zip(*((s.tensors() if s else ()) for s in (mine, other)), strict=True):
            assert_close(a, b, DECODE)
    assert device.captures == 1


@pytest.mark.long
@pytest.mark.usefixtures("poisoned_memory")
def test_a_verification_step_stands_as_far_as_it_is_accepted(model, assert_close, device):
    ours, theirs = fed(model, [5, 9, 2]), fed(model, [5, 9, 2])
    runner = ModelRunner(model, ours, make_pool=device.pool)
    for seed, slots in enumerate([[0, 2], [2, 1, 0], [1, 2]]):
        tokens = drawn(len(slots), 3, seed)
        out = runner.decode(tokens, slots, is_verification=True)
        other = plainly(model, theirs, tokens, slots, is_verification=True)
        same(out, other, assert_close)
        counts = [1 + (seed + slot) % 3 for slot in slots]
        ours.accept(out.layout, counts)
        theirs.accept(other[2], counts)
    every = drawn(3, 1, 9)
    same(runner.decode(every, [0, 1, 2]), plainly(model, theirs, every, [0, 1, 2]), assert_close)


def test_the_comparison_transformer_too(assert_close, device):
    model = tiny_model(qwen_config(1))
    prompts = tokens_for(model.config, 12, seed=3)
    caches = [model.new_state(2) for _ in range(2)]
    for cache in caches:
        model(prompts, layout=cache.layout([4, 8]), state=cache)
    runner = ModelRunner(model, caches[0], make_pool=device.pool)
    for seed in range(3):
        tokens = drawn(2, 1, seed)
        same(runner.decode(tokens, [1, 0]), plainly(model, caches[1], tokens, [1, 0]), assert_close)


@pytest.mark.long
def test_memory_that_moves_is_captured_anew(model, assert_close, device):
    ours, theirs = fed(model, [60]), fed(model, [60])
    runner = ModelRunner(model, ours, make_pool=device.pool)
    for seed in range(5):
        tokens = drawn(1, 2, seed)
        same(runner.decode(tokens, [0]), plainly(model, theirs, tokens, [0]), assert_close)
    assert device.captures == 2
    runner.clear_graphs()
    runner.decode(drawn(1, 2, 0), [0])
    assert device.captures == 3


@pytest.mark.long
@pytest.mark.parametrize("drafts", [0, 2])
def test_the_engine_steps_by_graphs(drafts, device):
    """Both the model and the draft block use graphs."""
    model = tiny_model(tiny_config("ME*E/*E/*E"))
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    config = EngineConfig(
        max_num_seqs=2, max_model_len=64, page_size=16, max_draft_tokens=drafts, adapts_drafts=False
    )
    engine = Engine(model, config, make_runner=partial(ModelRunner, make_pool=device.pool))
    prompts = {
        name: tuple(tokens_for(CONFIG, length, seed=length).tolist())
        for name, length in (("a", 3), ("b", 7))
    }
    for name, prompt in prompts.items():
        engine.add(EngineRequest(request_id=name, prompt=prompt, params=params))
    answers = {name: [] for name in prompts}
    while engine.has_work:
        for delta in engine.step():
            answers[delta.request_id] += delta.tokens
    assert device.replays >= 2
    assert (engine.stats().drafted_tokens > 0) == (drafts > 0)
    for name, prompt in prompts.items():
        known = [*prompt]
        for token in answers[name]:
            logits = model(torch.tensor([known]))[0, -1]
            assert logits.max() - logits[token] < 1e-4
            known.append(token)


def test_padding_is_at_most_an_eighth():
    for rows in range(1, 600):
        assert rows <= padded_rows(rows) <= rows * 9 / 8
    assert len({padded_rows(rows) for rows in range(1, 257)}) < 50
