"""The kernels of decoding steps in Triton's interpreter, held to what test_decode.py says."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.attention import attention, attention_steps
from nemotron3.ops.conv import causal_conv_steps
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd_steps
from tests.ops import test_decode as contract
from tests.ops.contract import randn
from tests.ops.test_decode import SLOTS, every_shape, pool
from tests.ops.test_ssd import operands
from tests.tolerances import FLOAT32

KERNEL = {"backend": "triton", "dtype": torch.float32, "tolerance": FLOAT32}
BFLOAT16 = 2e-2
"""Operands of products are rounded to 8 bits, and so is the result."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@every_shape
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("channels", "taps"), [(7, 4), (40, 3)])
def test_convolution(rows, steps, has_bias, channels, taps, assert_close):
    sizes = {"channels": channels, "taps": taps}
    contract.test_convolution(
        rows, steps, has_bias=has_bias, assert_close=assert_close, **sizes, **KERNEL
    )


@pytest.mark.parametrize(("channels", "taps", "steps"), [(300, 4, 1), (7, 2, 3), (5, 1, 2)])
def test_convolution_of_any_size(channels, taps, steps, assert_close):
    x, conv_states = randn(2 * steps, channels).float(), randn(2, taps - 1, channels).float()
    weight, bias = randn(channels, taps).float(), randn(channels).float()
    expected, actual = pool(conv_states), pool(conv_states)
    y, z = (
        causal_conv_steps(x, weight, bias, conv_states=held, slots=SLOTS[:2], backend=backend)
        for held, backend in ((expected, "torch"), (actual, "triton"))
    )
    assert_close(z, y, FLOAT32)
    assert torch.equal(actual[SLOTS[:2]], expected[SLOTS[:2]])


@every_shape
@pytest.mark.parametrize(("head_dim", "d_state"), [(1, 3), (8, 16), (33, 65)])
def test_scan(rows, steps, head_dim, d_state, assert_close):
    contract.test_scan(rows, steps, head_dim, d_state, assert_close=assert_close, **KERNEL)


@pytest.fixture(params=[512, 20], ids=["one range", "many ranges"])
def range_keys(request, monkeypatch):
    from nemotron3.ops.attention import decode_triton as kernels  # noqa: PLC0415 - after the interpreter

    monkeypatch.setattr(kernels, "_RANGE_KEYS", request.param)
    return request.param


@every_shape
@pytest.mark.usefixtures("range_keys")
@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 3), (6, 2, 16), (4, 4, 33)])
def test_attention(rows, steps, page_size, heads, kv_heads, head_dim, assert_close):
    contract.test_attention(
        rows, steps, page_size, heads, kv_heads, head_dim, assert_close=assert_close, **KERNEL
    )


def paged(lengths, steps, *, kv_heads=2, head_dim=16, page_size=16, width=16, dtype=torch.float32):
    """Keys and values of sequences in pages, NaN elsewhere; new ones are still to come."""
    table = torch.randperm(len(lengths) * width).view(len(lengths), width)
    shape = (table.numel(), page_size, kv_heads, head_dim)
    streams = [
        [randn(length + steps, kv_heads, head_dim).to(dtype) for length in lengths]
        for _ in range(2)
    ]
    pools = []
    for sequences in streams:
        held = torch.full(shape, torch.nan, dtype=dtype)
        for row, sequence in enumerate(sequences):
            for i, token in enumerate(sequence[: lengths[row]]):
                held[table[row, i // page_size], i % page_size] = token
        pools.append(held)
    new = [torch.cat([s[-steps:] for s in sequences]) for sequences in streams]
    return table, pools, streams, new


@pytest.mark.usefixtures("range_keys")
@pytest.mark.parametrize(
    ("lengths", "steps", "heads", "dtype", "tolerance"),
    [
        ((200, 7), 1, 32, torch.bfloat16, BFLOAT16),
        ((39, 40), 4, 32, torch.bfloat16, BFLOAT16),
        ((100, 19), 16, 12, torch.float32, FLOAT32),
    ],
)
def test_attention_of_large_groups(lengths, steps, heads, dtype, tolerance, assert_close):
    """As in the published models: sixteen query heads share keys, more rows than one program's."""
    table, pools, streams, new = paged(lengths, steps, dtype=dtype)
    q = randn(len(lengths) * steps, heads, 16).to(dtype)
    expected = attention(
        q.double(), *(torch.cat(sequences).double() for sequences in streams),
        queries=Segments.uniform(len(lengths), steps),
        keys=Segments([length + steps for length in lengths]), backend="reference",
    )  # fmt: skip
    y = attention_steps(
        q, *new, keys=pools[0], values=pools[1], table=table,
        slots=torch.arange(len(lengths)), cached_lengths=torch.tensor(lengths), backend="triton",
    )  # fmt: skip
    assert y.dtype == dtype
    assert_close(y.double(), expected, tolerance)


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)]
)
def test_attention_widens_keys_kept_in_fewer_bits(kept, dtype, tolerance, assert_close):
    """Queries and weights are not rounded to the dtype of the keys."""
    pools = [randn(12, 4, 2, 16).to(kept) for _ in range(2)]
    q, k, v = (randn(4, heads, 16).to(kept).to(dtype) for heads in (4, 2, 2))
    q = randn(4, 4, 16).to(dtype)
    given = {"table": torch.randperm(12).view(2, 6), "slots": torch.tensor([1, 0]),
             "cached_lengths": torch.tensor([7, 13])}  # fmt: skip
    widened = [pool.double() for pool in pools]
    expected = attention_steps(
        q.double(), k.double(), v.double(), keys=widened[0], values=widened[1], **given
    )
    y = attention_steps(q, k, v, keys=pools[0], values=pools[1], **given, backend="triton")
    assert_close(y.double(), expected, tolerance)
    for narrow, wide in zip(pools, widened, strict=True):
        assert torch.equal(narrow.double(), wide)


def test_attention_reads_slices_of_one_projection_in_place():
    table, pools, _, new = paged((9, 5), 2)
    cached_lengths, slots = torch.tensor([9, 5]), torch.arange(2)
    q = randn(4, 4, 16).float()
    parts = torch.cat([t.flatten(1) for t in (q, *new)], dim=1).split([64, 32, 32], dim=1)
    results = []
    for query, key, value in ((q, *new), [p.unflatten(1, (-1, 16)) for p in parts]):
        held = [p.clone() for p in pools]
        y = attention_steps(
            query, key, value, keys=held[0], values=held[1], table=table, slots=slots,
            cached_lengths=cached_lengths, backend="triton",
        )  # fmt: skip
        results.append((y, *held))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.usefixtures("range_keys")
def test_company_changes_no_bit():
    """A sequence's result depends on nothing but itself, however long and many the others are."""
    table, pools, _, new = paged((90, 200, 3), 1)
    q = randn(3, 6, 16).float()
    cached_lengths, slots = torch.tensor([90, 200, 3]), torch.arange(3)

    def run(rows):
        return attention_steps(
            q[rows], new[0][rows], new[1][rows], keys=pools[0], values=pools[1], table=table,
            slots=slots[rows], cached_lengths=cached_lengths[rows], backend="triton",
        )  # fmt: skip

    assert torch.equal(run([0, 1, 2])[0], run([0])[0])


@pytest.mark.parametrize("tries", [False, True])
def test_padding_touches_nothing(tries):
    slots = torch.tensor([2, -1])
    x, conv_states = randn(6, 7).float(), randn(3, 3, 7).float()
    intermediate_states = torch.full((2, 3, 3, 7), torch.nan) if tries else None
    before = conv_states.clone()
    y = causal_conv_steps(
        x,
        randn(7, 4).float(),
        None,
        conv_states=conv_states,
        slots=slots,
        intermediate_states=intermediate_states,
        backend="triton",
    )
    assert (y[3:] == 0).all()
    assert torch.equal(conv_states[:2], before[:2])
    assert intermediate_states is None or intermediate_states[1].isnan().all()

    *tokens, states = (t.float() for t in operands((3, 3), head_dim=8, d_state=16))
    states, intermediate_states = torch.cat([states, states[:1]]), None
    if tries:
        intermediate_states = torch.full((2, 3, *states.shape[1:]), torch.nan)
    before = states.clone()
    y = ssd_steps(*tokens, states, slots, intermediate_states=intermediate_states, backend="triton")
    assert (y[3:] == 0).all()
    assert (y[:3] != 0).any()
    assert torch.equal(states[:2], before[:2])
    assert intermediate_states is None or intermediate_states[1].isnan().all()

    table, pools, _, new = paged((9, 5, 7), 3)
    before = [p.clone() for p in pools]
    y = attention_steps(
        randn(6, 4, 16).float(), *(t[:6] for t in new), keys=pools[0], values=pools[1],
        table=table, slots=slots, cached_lengths=torch.tensor([7, 0]), backend="triton",
    )  # fmt: skip
    assert (y[3:] == 0).all()
    assert (y[:3] != 0).any()
    for held, old in zip(pools, before, strict=True):
        changed = (held.nan_to_num() != old.nan_to_num()).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [table[2, 0].item()]


def test_float64_is_refused():
    x, conv_states = randn(2, 7), randn(2, 3, 7)
    with pytest.raises(BackendUnavailableError, match="'conv_steps' computes in float32"):
        causal_conv_steps(
            x, randn(7, 4), None, conv_states=conv_states, slots=torch.arange(2), backend="triton"
        )
    q, held = randn(2, 2, 16), randn(2, 8, 2, 16)
    with pytest.raises(BackendUnavailableError, match="'attention_steps' computes in float32"):
        attention_steps(
            q, q, q, keys=held, values=held, table=torch.tensor([[0], [1]]),
            slots=torch.arange(2), cached_lengths=torch.zeros(2, dtype=torch.long),
            backend="triton",
        )  # fmt: skip
