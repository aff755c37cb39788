"""The scan's kernels in Triton's interpreter, against the recurrence in float64."""

import pytest
import torch

import tests.ops.interpreter  # noqa: F401 - before any kernel is imported
from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd
from tests.ops.contract import outputs_and_gradients
from tests.ops.test_ssd import operands
from tests.tolerances import FLOAT32

LENGTHS = [(1,), (7,), (16, 16), (5, 1, 33, 16)]
BFLOAT16 = 2e-2
"""Operands of products are rounded to 8 bits twice or thrice on the way to a gradient."""


def scan(lengths, backend, chunk_size=16):
    segments = Segments(lengths)
    return lambda *t: ssd(
        *t[:6], segments=segments, chunk_size=chunk_size, initial_states=t[6], backend=backend
    )


def narrowed(inputs, dtype):
    """x, B and C in `dtype`, the rest in float32, as the model calls the scan."""
    return [t.to(dtype if i in (0, 3, 4) else torch.float32) for i, t in enumerate(inputs)]


def against_the_recurrence(lengths, inputs, assert_close, tolerance=FLOAT32, **cut):
    exact = [t.double() for t in inputs]
    expected = outputs_and_gradients(scan(lengths, "reference"), exact)
    actual = outputs_and_gradients(scan(lengths, "triton", **cut), inputs)
    dtypes = [inputs[0].dtype, torch.float32, *(t.dtype for t in inputs)]
    for a, e, dtype in zip(actual, expected, dtypes, strict=True):
        assert a.dtype == dtype
        assert_close(a.double(), e, tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)]
)
def test_equals_the_recurrence(lengths, dtype, tolerance, assert_close):
    inputs = narrowed(operands(lengths, head_dim=16, d_state=16), dtype)
    against_the_recurrence(lengths, inputs, assert_close, tolerance)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("heads", "groups", "head_dim", "d_state"), [(1, 1, 16, 16), (6, 3, 5, 40), (6, 1, 20, 7)]
)
@pytest.mark.parametrize("programs", [1, 264])
def test_any_sizes_and_any_division_of_labour(
    heads, groups, head_dim, d_state, programs, assert_close, monkeypatch
):
    monkeypatch.setattr("nemotron3.ops.ssd.triton._ENOUGH_PROGRAMS", programs)
    inputs = operands((18, 3), heads, head_dim, groups, d_state, dtype=torch.float32)
    against_the_recurrence((18, 3), inputs, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("chunk_size", [8, 24, 128])
def test_any_chunk_size(chunk_size, assert_close):
    inputs = operands((70,), heads=2, groups=1, head_dim=16, d_state=16, dtype=torch.float32)
    against_the_recurrence((70,), inputs, assert_close, chunk_size=chunk_size)


@pytest.mark.usefixtures("poisoned_memory")
def test_slices_of_one_projection_are_read_in_place(assert_close):
    inputs = operands((20,), head_dim=16, d_state=16, dtype=torch.float32)
    flat = [inputs[i].flatten(1) for i in (0, 3, 4)]
    pieces = torch.cat(flat, dim=1).split([t.shape[1] for t in flat], dim=1)
    sliced = list(inputs)
    for i, piece in zip((0, 3, 4), pieces, strict=True):
        sliced[i] = piece.unflatten(1, inputs[i].shape[1:])
        assert not sliced[i].is_contiguous()
    y, final = scan((20,), "triton")(*sliced)
    expected, expected_final = scan((20,), "triton")(*inputs)
    assert torch.equal(y, expected)
    assert torch.equal(final, expected_final)


def test_a_neighbour_changes_no_bit():
    inputs = operands((13, 20), head_dim=16, d_state=16, dtype=torch.float32)
    before = outputs_and_gradients(scan((13, 20), "triton"), inputs)
    inputs[0][12] += 1.0
    inputs[1][12] *= 3.0
    after = outputs_and_gradients(scan((13, 20), "triton"), inputs)
    y, final, dx, ddt, _, dB, dC, _, dinitial = zip(before, after, strict=True)
    assert not torch.equal(y[0][:13], y[1][:13])
    for old, new in (y, dx, ddt, dB, dC):
        assert torch.equal(old[13:], new[13:])
    for old, new in (final, dinitial):
        assert torch.equal(old[1], new[1])


def test_strong_decay_over_a_long_chunk_stays_finite():
    inputs = operands((64,), heads=1, groups=1, head_dim=16, d_state=16, dtype=torch.float32)
    inputs[1] = torch.full_like(inputs[1], 50.0)
    results = outputs_and_gradients(scan((64,), "triton", chunk_size=64), inputs)
    assert all(torch.isfinite(r).all() for r in results)


def test_float64_is_refused():
    with pytest.raises(BackendUnavailableError, match="float64"):
        scan((3,), "triton")(*operands((3,)))
