"""Narrow states: storage, rounding, and independence of slot and batch."""

import pytest
import torch

from nemotron3.errors import ConfigError
from nemotron3.models.cache.hybrid_cache import HybridCache
from nemotron3.models.cache.state_precision import StatePrecision
from nemotron3.ops.rounding import RandomBits, to_float16, to_int8
from tests.tiny import tiny_config, tiny_model, tokens_for

CONFIG = tiny_config("MEM*M*")
NARROW = [
    StatePrecision(ssm="float16", keys="float8"),
    StatePrecision(ssm="float16", rounding="nearest", keys="bfloat16"),
    StatePrecision(ssm="int8", seed=9, philox_rounds=7),
    StatePrecision(ssm="int8", keys="float8", key_scales=((0.5, 2.0), (0.01, 0.03))),
]
every_precision = pytest.mark.parametrize("precision", NARROW, ids=str)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    """A model in float64, in which the order of sums does not affect the rounding of states."""
    return tiny_model(CONFIG, dtype=torch.float64)


def call(model, cache, feeds, **kind):
    """Logits of each slot for the tokens it is fed."""
    lengths = [len(part) for part in feeds.values()]
    layout = cache.layout(lengths, list(feeds), **kind)
    logits = model(torch.cat(list(feeds.values())), layout=layout, state=cache)
    return layout, dict(zip(feeds, logits.split(lengths), strict=True))


def held(cache, slot):
    """All tensors of a slot, in order."""
    layers = [layer for layer in cache.layers if layer is not None]
    rows = [part for layer in layers for part in layer.copy(slot)]
    places = cache.table.places(torch.tensor(slot), torch.arange(cache.lengths[slot]))
    return rows + [
        entries.flatten(0, 1)[places].double() for layer in layers for entries in layer.pages
    ]


def assert_holds_the_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.allclose(mine.double(), theirs.double(), rtol=0, atol=1e-12)


@every_precision
def test_company_slot_and_drafts_change_nothing(model, precision):
    """A prompt and an answer alone in slot 0, and among others, drafted, forked, in slot 3."""
    prompt, answer = tokens_for(CONFIG, 11), tokens_for(CONFIG, 9, seed=2)
    alone = model.new_state(1, precision)
    call(model, alone, {0: prompt}, is_prompt=True)
    logits = [call(model, alone, {0: token})[1][0] for token in answer.split(1)]

    busy = model.new_state(5, precision)
    call(model, busy, {2: tokens_for(CONFIG, 5, seed=3)})
    others = {1: tokens_for(CONFIG, 11, seed=4), 3: prompt, 0: tokens_for(CONFIG, 30, seed=5)}
    call(model, busy, others, is_prompt=True)
    snapshot = busy.snapshot(3)
    call(model, busy, {3: answer.flip(0), 1: answer})
    busy.restore(4, snapshot)
    read = 0
    for drafted, stands in ((3, 2), (4, 1), (1, 1), (5, 5)):
        tokens = answer[read : read + stands].clone()
        tokens = torch.cat([tokens, tokens_for(CONFIG, drafted - stands, seed=read)])
        feeds = {2: tokens_for(CONFIG, drafted, seed=6), 4: tokens}
        layout, seen = call(model, busy, feeds, is_verification=True)
        for i in range(stands):
            assert torch.allclose(seen[4][i], logits[read + i], rtol=0, atol=1e-10)
        busy.accept(layout, [1, stands])
        read += stands
    assert busy.lengths[4] == alone.lengths[0] == 20
    assert_holds_the_same(held(busy, 4), held(alone, 0))


@pytest.mark.parametrize("ssm", ["float16", "int8"])
def test_a_step_widens_reads_rounds_and_keeps(model, ssm):
    """The state after each step is the rounded result of an exact step from the state before."""
    precision = StatePrecision(ssm=ssm, seed=3)
    exact, narrow = model.new_state(1), model.new_state(1, precision)
    for cache in (exact, narrow):
        call(model, cache, {0: tokens_for(CONFIG, 11)}, is_prompt=True)
    layer, wide = narrow.layers[0], exact.layers[0]
    positions, bits = torch.tensor([11]), RandomBits(3, 0, 5)

    def rounded(states):
        flat = (to_float16(states, positions, bits),)
        return flat if ssm == "float16" else to_int8(states, positions, bits)

    for token in tokens_for(CONFIG, 6, seed=8).split(1):
        expected = rounded(wide.ssm_states[0])
        ours = tuple(part[:1] for part in layer.ssm_states)
        for part, mine in zip(ours, expected, strict=True):
            assert torch.equal(part, mine)
        wide.ssm_states[0].copy_(layer.format.dequantize(ours))
        for cache in (exact, narrow):
            call(model, cache, {0: token})
        positions += 1


def test_prompts_are_rounded_where_a_call_ends_and_steps_at_every_token(model):
    precision = StatePrecision(ssm="float16")
    tokens = tokens_for(CONFIG, 6)
    as_prompt, as_steps, one_by_one = (model.new_state(1, precision) for _ in range(3))
    call(model, as_prompt, {0: tokens}, is_prompt=True)
    call(model, as_steps, {0: tokens})
    for token in tokens.split(1):
        call(model, one_by_one, {0: token}, is_prompt=True)
    assert_holds_the_same(held(as_steps, 0), held(one_by_one, 0))
    different = [
        not torch.equal(a, b) for a, b in zip(held(as_prompt, 0), held(as_steps, 0), strict=True)
    ]
    assert any(different)


@pytest.mark.parametrize(
    ("precision", "bytes_of_state"),
    [
        (StatePrecision(), 8.0),  # a float64 model computes and keeps its states in float64
        (StatePrecision(ssm="float16"), 2.0),
        (StatePrecision(ssm="int8"), 1 + 4 / CONFIG.mamba.ssm_state_size),
    ],
)
def test_snapshots_are_as_narrow_as_states(model, precision, bytes_of_state):
    cache = model.new_state(2, precision)
    mamba = CONFIG.mamba
    elements = mamba.mamba_num_heads * mamba.mamba_head_dim * mamba.ssm_state_size
    tails = (mamba.conv_kernel - 1) * mamba.conv_channels * 8
    assert cache.snapshot(0).nbytes == 3 * (tails + elements * bytes_of_state)


def test_narrow_keys_are_the_same_for_who_brings_them_and_who_comes_later(model):
    """Float8 keys do not depend on whether a prompt is prefilled in chunks."""
    tokens = tokens_for(CONFIG, 40)
    precision = StatePrecision(keys="float8")
    logits = []
    for lengths in ((40,), (17, 3, 20), (1,) * 40):
        cache = model.new_state(1, precision)
        parts = [call(model, cache, {0: part})[1][0] for part in tokens.split(lengths)]
        logits.append(torch.cat(parts))
    exact = call(model, model.new_state(1), {0: tokens})[1][0]
    for others in logits[1:]:
        assert torch.allclose(others, logits[0], rtol=0, atol=1e-10)
    assert 1e-3 < (logits[0] - exact).abs().max() < 0.5 * exact.std()


def test_scales_bring_keys_into_the_range_of_float8(model):
    """Keys a thousand times as large saturate without a scale and do not with it."""
    large = tiny_model(CONFIG, dtype=torch.float64)
    for layer in large.backbone.layers:
        if hasattr(layer.mixer, "v_proj"):
            layer.mixer.v_proj.weight.mul_(1000.0)
            layer.mixer.o_proj.weight.div_(1000.0)
    tokens = tokens_for(CONFIG, 40)
    exact = call(large, large.new_state(1), {0: tokens})[1][0]
    error = {}
    for scales in ((), ((1.0, 1000.0),) * 2):
        cache = large.new_state(1, StatePrecision(keys="float8", key_scales=scales))
        steps = [call(large, cache, {0: part})[1][0] for part in tokens.split(5)]
        error[scales] = (torch.cat(steps) - exact).abs().max()
    assert error[()] > 4 * error[((1.0, 1000.0),) * 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"philox_rounds": 0}, "philox_rounds is 0; it must be from 1 to 16"),
        ({"ssm": "int8", "seed": -1}, "seed is -1"),
        ({"philox_rounds": 7}, "philox_rounds is 7, which does nothing while ssm is float32"),
        ({"rounding": "nearest"}, "rounding is nearest, which does nothing while ssm is float32"),
        ({"ssm": "int8", "rounding": "nearest", "seed": 1}, "nothing while rounding is nearest"),
        ({"key_scales": ((1.0, 1.0),)}, "key_scales is .* does nothing while keys is model"),
        ({"keys": "float8", "key_scales": ((1.0, 0.0),)}, "each must be above 0"),
    ],
)
def test_what_does_nothing_or_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        StatePrecision(**wrong)


def test_too_few_scales_are_refused():
    with pytest.raises(ConfigError, match="1 pairs for 2 layers with keys and values"):
        HybridCache(
            CONFIG, slots=1, dtype=torch.float32, device=torch.device("cpu"),
            precision=StatePrecision(keys="float8", key_scales=((1.0, 1.0),)),
        )  # fmt: skip
