"""A few tokens of each sequence, out of pools, against the same operations over whole sequences.

Sequences take scattered slots and pages, and what lies around them is NaN.
"""

import pytest
import torch

from nemotron3.ops import native
from nemotron3.ops.attention import attention, attention_steps
from nemotron3.ops.conv import causal_conv, causal_conv_steps
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd, ssd_steps
from tests.ops.contract import randn
from tests.ops.test_ssd import operands
from tests.tolerances import FLOAT32, FLOAT64

SLOTS = torch.tensor([4, 0, 3])
CASES = [("torch", torch.float64, FLOAT64), ("torch", torch.float32, FLOAT32)]
NATIVE = [("native", torch.float32, FLOAT32)] if native.available() else []
every_case = pytest.mark.parametrize(("backend", "dtype", "tolerance"), CASES + NATIVE)
every_shape = pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 1), (1, 5), (3, 4)])


def pool(values, slots=6):
    held = torch.full((slots, *values.shape[1:]), torch.nan, dtype=values.dtype)
    held[SLOTS[: len(values)]] = values
    return held


@every_case
@every_shape
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("channels", "taps"), [(7, 4), (40, 4), (40, 3)])
def test_convolution(
    rows, steps, backend, dtype, tolerance, has_bias, channels, taps, assert_close
):
    x = randn(rows * steps, channels, dtype=dtype)
    conv_states = randn(rows, taps - 1, channels, dtype=dtype)
    weight = randn(channels, taps, dtype=dtype)
    bias = randn(channels, dtype=dtype) if has_bias else None
    segments, slots = Segments.uniform(rows, steps), SLOTS[:rows]
    y, after = causal_conv(
        x, weight, bias, segments=segments, conv_states=conv_states, backend="reference"
    )
    held = pool(conv_states)
    intermediate_states = torch.full((rows, steps, taps - 1, channels), torch.nan, dtype=dtype)
    given = {"slots": slots, "backend": backend}
    tried = causal_conv_steps(
        x, weight, bias, conv_states=held, intermediate_states=intermediate_states, **given
    )
    assert torch.equal(held[slots], conv_states)
    done = causal_conv_steps(x, weight, bias, conv_states=held, **given)
    assert_close(done, y, tolerance)
    assert torch.equal(tried, done)
    assert torch.equal(held[slots], after)
    assert torch.equal(intermediate_states[:, -1], after)
    assert held.isnan().all(-1).all(-1).sum() == 6 - rows
    history = torch.cat([conv_states, x.unflatten(0, (rows, steps))], 1)
    for t in range(steps):
        assert torch.equal(intermediate_states[:, t], history[:, t + 1 : t + taps])


@every_case
@every_shape
@pytest.mark.parametrize(("head_dim", "d_state"), [(1, 3), (8, 16), (33, 65)])
def test_scan(rows, steps, head_dim, d_state, backend, dtype, tolerance, assert_close):
    *tokens, initial = (
        t.to(dtype) for t in operands((steps,) * rows, head_dim=head_dim, d_state=d_state)
    )
    x, dt, A, B, C, D = tokens
    slots = SLOTS[:rows]

    def whole(kept):
        cut = [t.unflatten(0, (rows, steps))[:, :kept].flatten(0, 1) for t in (x, dt, B, C)]
        exact = [t.double() for t in (cut[0], cut[1], A, cut[2], cut[3], D)]
        return ssd(
            *exact, segments=Segments.uniform(rows, kept), chunk_size=8,
            initial_states=initial.double(), backend="reference",
        )  # fmt: skip

    held = pool(initial)
    intermediate_states = torch.full(
        (rows + 1, steps + 2, *initial.shape[1:]), torch.nan, dtype=dtype
    )
    intermediate_states = intermediate_states[:rows, :steps]
    tried = ssd_steps(
        *tokens, held, slots, intermediate_states=intermediate_states, backend=backend
    )
    assert torch.equal(held[slots], initial)
    done = ssd_steps(*tokens, held, slots, backend=backend)
    y, final = whole(steps)
    assert_close(done.double(), y, tolerance)
    assert torch.equal(tried, done)
    assert_close(held[slots].double(), final, tolerance)
    assert torch.equal(intermediate_states[:, -1], held[slots])
    for t in range(steps):
        assert_close(intermediate_states[:, t].double(), whole(t + 1)[1], tolerance)


@every_case
@every_shape
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 3), (6, 2, 16), (4, 4, 33)])
def test_attention(
    rows, steps, page_size, heads, kv_heads, head_dim, backend, dtype, tolerance, assert_close
):
    cached_lengths = torch.tensor([0, 37, 5][:rows])
    lengths = (cached_lengths + steps).tolist()
    keys, values = (randn(sum(lengths), kv_heads, head_dim, dtype=dtype) for _ in range(2))
    q = randn(rows * steps, heads, head_dim, dtype=dtype)
    expected = attention(
        q.double(), keys.double(), values.double(),
        queries=Segments.uniform(rows, steps), keys=Segments(lengths), backend="reference",
    )  # fmt: skip

    width = 45 // page_size + 1
    order = torch.randperm(6 * width)
    table, pages = order.view(6, width), len(order)
    shape = (pages, page_size, kv_heads, head_dim)
    pools = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    new = []
    for held, stream in zip(pools, (keys, values), strict=True):
        arriving = []
        for slot, sequence in zip(SLOTS, stream.split(lengths), strict=False):
            for i, token in enumerate(sequence[:-steps]):
                held[table[slot, i // page_size], i % page_size] = token
            arriving.append(sequence[-steps:])
        new.append(torch.cat(arriving))
    if backend == "torch":  # it reads whole pages and masks them: 0 * NaN would show
        pools = [held.nan_to_num() for held in pools]
    y = attention_steps(
        q, *new, keys=pools[0], values=pools[1], table=table, slots=SLOTS[:rows],
        cached_lengths=cached_lengths, backend=backend,
    )  # fmt: skip
    assert_close(y.double(), expected, tolerance)
    for held, stream in zip(pools, (keys, values), strict=True):
        for slot, sequence in zip(SLOTS, stream.split(lengths), strict=False):
            for i, token in enumerate(sequence):
                assert torch.equal(held[table[slot, i // page_size], i % page_size], token)


def test_bfloat16_is_widened_inside(assert_close):
    *tokens, initial = (t.float() for t in operands((2, 2), head_dim=8, d_state=16))
    exact = ssd_steps(*tokens, pool(initial), SLOTS[:2])
    narrow = [t.bfloat16() if i in (0, 3, 4) else t for i, t in enumerate(tokens)]
    y = ssd_steps(*narrow, pool(initial), SLOTS[:2])
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), exact, 2e-2)
