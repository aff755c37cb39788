"""The scan: chunks and steps against the recurrence, at lengths that do not fit the chunk."""

import pytest
import torch

from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd, ssd_rates
from tests.ops.contract import outputs_and_gradients, randn
from tests.ops.native import needs_compiler
from tests.tolerances import FLOAT32, FLOAT64

LENGTHS = [(1,), (7,), (16, 16), (9, 9), (5, 1, 33, 16), (1, 1, 1), (8, 3)]


def operands(lengths, heads=4, head_dim=3, groups=2, d_state=5, dtype=torch.float64):
    tokens = sum(lengths)
    return [
        randn(tokens, heads, head_dim, dtype=dtype),
        torch.rand(tokens, heads, dtype=dtype) * 0.5,
        -torch.rand(heads, dtype=dtype) * 8 - 1,
        randn(tokens, groups, d_state, dtype=dtype),
        randn(tokens, groups, d_state, dtype=dtype),
        randn(heads, dtype=dtype),
        randn(len(lengths), heads, head_dim, d_state, dtype=dtype),
    ]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [(16,), (7, 20)])
def test_steep_and_gentle_decay_side_by_side(lengths, assert_close):
    """Some heads decay within a token, some not within a chunk; each is computed in its own way."""
    inputs = operands(lengths)
    inputs[1] *= torch.tensor([0.01, 1.0, 30.0, 1000.0])
    inputs[1][3:9] *= 0.1
    expected = outputs_and_gradients(scan(lengths, "reference"), inputs)
    actual = outputs_and_gradients(scan(lengths, "torch"), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, FLOAT64)
    # The gradient of A is a difference of huge numbers here, in float32 for any order of summing.
    single = outputs_and_gradients(scan(lengths, "torch"), [t.float() for t in inputs])
    for a, e in zip(single[:2], expected[:2], strict=True):
        assert_close(a.double(), e, FLOAT32)
    assert all(torch.isfinite(t).all() for t in single)


def scan(lengths, backend):
    segments = Segments(lengths)
    return lambda *t: ssd(
        *t[:6], segments=segments, chunk_size=8, initial_states=t[6], backend=backend
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)]
)
def test_chunks_equal_the_recurrence(lengths, dtype, tolerance, assert_close):
    inputs = operands(lengths, dtype=dtype)
    exact = [t.double() for t in inputs]
    expected = outputs_and_gradients(scan(lengths, "reference"), exact)
    actual = outputs_and_gradients(scan(lengths, "torch"), inputs)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.double(), e, tolerance)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 1), (6, 6), (6, 3)])
def test_heads_share_groups(heads, groups, assert_close):
    inputs = operands((11, 4), heads=heads, groups=groups)
    expected, _ = scan((11, 4), "reference")(*inputs)
    actual, _ = scan((11, 4), "torch")(*inputs)
    assert_close(actual, expected, FLOAT64)


def test_halves_chained_through_the_state_equal_the_whole(assert_close):
    x, dt, A, B, C, D, h = operands((21,))
    whole, final = ssd(x, dt, A, B, C, D, segments=Segments((21,)), chunk_size=8, initial_states=h)
    first, middle = ssd(
        x[:10], dt[:10], A, B[:10], C[:10], D,
        segments=Segments((10,)), chunk_size=8, initial_states=h,
    )  # fmt: skip
    second, last = ssd(
        x[10:], dt[10:], A, B[10:], C[10:], D,
        segments=Segments((11,)), chunk_size=8, initial_states=middle,
    )  # fmt: skip
    assert_close(torch.cat([first, second]), whole, FLOAT64)
    assert_close(last, final, FLOAT64)


def test_a_neighbour_changes_no_bit():
    inputs = operands((13, 20), dtype=torch.float32)
    before, _ = scan((13, 20), "torch")(*inputs)
    inputs[0][12] += 1.0
    inputs[1][12] *= 3.0
    after, _ = scan((13, 20), "torch")(*inputs)
    assert not torch.equal(before[:13], after[:13])
    assert torch.equal(before[13:], after[13:])


def test_strong_decay_over_a_long_chunk_stays_finite():
    inputs = operands((256,), dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], 50.0)
    results = outputs_and_gradients(
        lambda *t: ssd(*t[:6], segments=Segments((256,)), chunk_size=256), inputs
    )
    assert all(torch.isfinite(r).all() for r in results)


@pytest.mark.parametrize("lengths", [(5, 3), (4, 4)])
def test_gradcheck(lengths):
    inputs = [t.requires_grad_() for t in operands(lengths, heads=2, head_dim=2, d_state=2)]
    assert torch.autograd.gradcheck(scan(lengths, "torch"), inputs)


@needs_compiler
def test_native_rates_equal_the_formulas(assert_close):
    """From steps of nearly zero to those where softplus is the identity."""
    wide, bias, A_log = 40 * randn(50, 9).float(), randn(6).float(), randn(6).float()
    dt = wide[:, 2:8]
    expected = ssd_rates(dt.double(), bias.double(), A_log.double(), backend="reference")
    for mine, wanted in zip(ssd_rates(dt, bias, A_log, backend="native"), expected, strict=True):
        assert ((mine - wanted).abs() <= 1e-5 * wanted.abs() + 1e-37).all()
    leaves = [dt, bias, A_log]
    reference = outputs_and_gradients(lambda *t: ssd_rates(*t, backend="reference"), leaves)
    native = outputs_and_gradients(lambda *t: ssd_rates(*t, backend="native"), leaves)
    for mine, wanted in zip(native, reference, strict=True):
        assert_close(mine, wanted, FLOAT32)
