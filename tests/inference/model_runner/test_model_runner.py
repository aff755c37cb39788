"""Decoding steps through the runner are the model's own forward pass."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.inference.model_runner import ModelRunner
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.ops.native import calls
from tests.ops.native import needs_compiler
from tests.tiny import tiny_config, tiny_model, tokens_for

CONFIG = tiny_config("MEM*E")
SLOTS = 4
PRECISIONS = {
    "wide": None,
    "float16": StatePrecision(ssm="float16", seed=1),
    "int8": StatePrecision(ssm="int8"),
    "nearest": StatePrecision(ssm="int8", rounding="nearest"),
    "float8 keys": StatePrecision(ssm="float16", keys="float8"),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


@pytest.fixture(autouse=True)
def _team(monkeypatch):
    """Use several threads, as for a larger model; by default such small steps use one."""
    monkeypatch.setattr(calls, "WORK_PER_THREAD", 1)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model(CONFIG)


def fed(model, lengths, precision=None):
    """A state whose slots hold prompts of these lengths."""
    cache = model.new_state(len(lengths), precision)
    prompts = tokens_for(CONFIG, sum(lengths), seed=7)
    model(prompts, layout=cache.layout(lengths), state=cache)
    return cache


def drawn(rows, steps, seed):
    return tokens_for(CONFIG, rows, steps, seed=seed).tolist()


def plainly(model, cache, tokens, slots, *, is_verification=False):
    """The same step by the model itself."""
    lengths = [len(part) for part in tokens]
    layout = cache.layout(lengths, slots, is_verification=is_verification)
    flat = torch.tensor(tokens).flatten()
    hidden = model.hidden_states(flat, layout=layout, state=cache)
    shape = len(slots), lengths[0]
    return hidden.unflatten(0, shape), model.logits(hidden).unflatten(0, shape), layout


def assert_same(ours, theirs):
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        assert torch.equal(mine, other)


@every_precision
def test_steps_are_those_of_the_model_bit_for_bit(model, precision):
    """For any slots, their order and number, and the lengths of their sequences."""
    lengths = [5, 1, 17, 70]
    ours, theirs = fed(model, lengths, precision), fed(model, lengths, precision)
    runner = ModelRunner(model, ours)
    calls = [[0, 1, 2, 3], [2], [3, 1], [1, 3], [0], [2], [0, 1, 2, 3], [3, 2, 1], [1, 3]]
    for steps in (1, 3):
        for seed, slots in enumerate(calls):
            tokens = drawn(len(slots), steps, seed)
            assert_same(runner.decode(tokens, slots), plainly(model, theirs, tokens, slots))
    assert ours.lengths == theirs.lengths


def test_steps_go_on_as_sequences_take_pages(model):
    """The memory of the state grows several times."""
    ours, theirs = fed(model, [3, 60]), fed(model, [3, 60])
    runner = ModelRunner(model, ours)
    for seed in range(40):
        tokens = drawn(2, 16, seed)
        assert_same(runner.decode(tokens, [0, 1]), plainly(model, theirs, tokens, [0, 1]))


@every_precision
def test_a_tentative_step_stands_as_far_as_it_is_accepted(model, precision):
    ours, theirs = fed(model, [5, 9, 2], precision), fed(model, [5, 9, 2], precision)
    runner = ModelRunner(model, ours)
    for seed, (steps, slots) in enumerate([(3, [0, 2]), (1, [1]), (5, [2, 1, 0]), (3, [1, 2])] * 2):
        tokens = drawn(len(slots), steps, seed)
        out = runner.decode(tokens, slots, is_verification=True)
        other = plainly(model, theirs, tokens, slots, is_verification=True)
        assert_same(out, other)
        counts = [1 + (seed + slot) % steps for slot in slots]
        ours.accept(out.layout, counts)
        theirs.accept(other[2], counts)
        assert_same(
            runner.decode(drawn(3, 1, seed), [0, 1, 2]),
            plainly(model, theirs, drawn(3, 1, seed), [0, 1, 2]),
        )


@pytest.mark.parametrize("tokens", [[], [[]], [[1, 2], [3]], [[1] * 17]])
def test_what_is_no_step_is_refused(model, tokens):
    runner = ModelRunner(model, fed(model, [5, 9]))
    with pytest.raises(ConfigError, match="the same number for each, from 1 to 16"):
        runner.decode(tokens, list(range(len(tokens))))


@needs_compiler
def test_steps_are_recorded_once_per_shape_and_anew_as_memory_grows(model, monkeypatch):
    """With a recording, no step may run in Python."""
    runner = ModelRunner(model, fed(model, [5, 9]))
    passes = []
    forward = model.backbone.forward
    monkeypatch.setattr(
        model.backbone, "forward", lambda *args, **more: passes.append(1) or forward(*args, **more)
    )
    for _ in range(5):
        runner.decode([[1], [2]], [0, 1])
        runner.decode([[1]], [1])
    assert len(passes) == 2
    runner.clear_graphs()
    runner.decode([[1]], [1])
    assert len(passes) == 3
    for _ in range(70):  # into the next page
        runner.decode([[1]], [1])
    assert len(passes) == 4


def test_steps_of_what_cannot_be_recorded_are_the_models_own():
    model = tiny_model(CONFIG, dtype=torch.float64)
    ours, theirs = fed(model, [5, 9]), fed(model, [5, 9])
    runner = ModelRunner(model, ours)
    for seed in range(3):
        tokens = drawn(2, 2, seed)
        assert_same(runner.decode(tokens, [1, 0]), plainly(model, theirs, tokens, [1, 0]))


def test_a_recorded_step_that_does_not_continue_the_state_is_refused(model):
    runner = ModelRunner(model, fed(model, [5, 9]))
    for _ in range(2):
        with pytest.raises(ConfigError, match="a slot of its own"):
            runner.decode([[1], [2]], [0, 0])
        runner.decode([[1], [2]], [0, 1])
