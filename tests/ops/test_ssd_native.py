"""The compiled scan against the recurrence, at lengths and widths that fit no tile."""

import pytest
import torch

from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd
from tests.ops.contract import outputs_and_gradients, randn
from tests.ops.native import assert_native_equals_reference, needs_compiler
from tests.ops.test_ssd import operands as plain_operands
from tests.tolerances import FLOAT32

pytestmark = needs_compiler

LENGTHS = [(1,), (47,), (48,), (63,), (64,), (65,), (200,), (5, 1, 97, 49)]


def operands(lengths, heads=4, head_dim=3, groups=2, d_state=5):
    """Numbers that float32 holds, with B C^T and x x^T of a size around one for any width."""
    x, dt, A, B, C, D, h = plain_operands(lengths, heads, head_dim, groups, d_state)
    inputs = [x * head_dim**-0.5, dt, A, B * d_state**-0.25, C * d_state**-0.25, D, h]
    return [t.float().double() for t in inputs]


def scan(lengths, backend):
    segments = Segments(lengths)
    return lambda *t: ssd(
        *t[:6], segments=segments, chunk_size=8, initial_states=t[6], backend=backend
    )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (8, 2), (3, 1)])
@pytest.mark.parametrize(("head_dim", "d_state"), [(1, 3), (5, 16), (16, 65), (33, 16)])
def test_equals_the_recurrence(lengths, heads, groups, head_dim, d_state, assert_close):
    inputs = operands(lengths, heads, head_dim, groups, d_state)
    assert_native_equals_reference(lambda b: scan(lengths, b), inputs, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_wide_blocks_of_heads_equal_the_recurrence(assert_close):
    """More columns than one block of heads holds."""
    inputs = operands((70, 3), heads=7, head_dim=64, groups=1, d_state=4)
    assert_native_equals_reference(lambda b: scan((70, 3), b), inputs, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_steps_of_zero_change_nothing(assert_close):
    inputs = operands((100,))
    inputs[1][:60] = 0
    assert_native_equals_reference(lambda b: scan((100,), b), inputs, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [(30,), (7, 120)])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_steep_and_gentle_decay_side_by_side(lengths, scale, assert_close):
    inputs = operands(lengths, head_dim=16, d_state=16)
    inputs[1] *= torch.tensor([0.01, 1.0, 30.0, 1000.0]) * scale
    inputs[1][3:9] *= 0.1 / scale
    inputs = [t.float().double() for t in inputs]
    expected = outputs_and_gradients(scan(lengths, "reference"), inputs)
    actual = outputs_and_gradients(scan(lengths, "native"), [t.float() for t in inputs])
    d_A = 4  # after two outputs and two gradients: here a small difference of huge numbers
    assert torch.isfinite(actual.pop(d_A)).all()
    expected.pop(d_A)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.double(), e, FLOAT32)


@pytest.mark.parametrize("lengths", [(100,), (30, 70, 1)])
def test_neighbours_change_no_bit(lengths):
    """Packed between others, outputs and gradients of a segment are those that it has alone."""
    alone = [t.float() for t in operands(lengths, head_dim=33, d_state=17)]
    around = [t.float() for t in operands((5, 49), head_dim=33, d_state=17)]
    packed = [
        t if i in (2, 5) else torch.cat([a[: 1 if i == 6 else 5], t, a[1 if i == 6 else 5 :]])
        for i, (t, a) in enumerate(zip(alone, around, strict=True))
    ]
    everything = (5, *lengths, 49)
    results = []
    for inputs, run, tokens, rows in (
        (alone, lengths, slice(None), slice(None)),
        (packed, everything, slice(5, -49), slice(1, -1)),
    ):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y, final = scan(run, "native")(*leaves)
        ((y**2).sum() + (final**2).sum()).backward()
        grads = [leaf.grad for leaf in leaves]
        results.append([y[tokens], final[rows], grads[6][rows]])
        results[-1] += [grads[i][tokens] for i in (0, 1, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4, 6), (5,)])
@pytest.mark.parametrize("output", [0, 1])
def test_only_what_is_wanted(wanted, output, assert_close):
    """Frozen operands get no gradient, and either output may go unused."""
    inputs = operands((60, 50), head_dim=16, d_state=16)
    if output == 1 and wanted[-1] in (4, 5):
        wanted = (*wanted, 0)  # the final states know neither C nor D
    grads = []
    for backend, dtype in (("reference", torch.float64), ("native", torch.float32)):
        leaves = [t.to(dtype, copy=True).requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        scan((60, 50), backend)(*leaves)[output].sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    assert [i for i, grad in enumerate(grads[1]) if grad is not None] == sorted(wanted)
    for expected, actual in zip(*grads, strict=True):
        if actual is not None:
            expected = torch.zeros_like(actual) if expected is None else expected
            assert_close(actual.double(), expected.double(), FLOAT32)


def test_slices_of_wider_rows_are_read_in_place():
    x, dt, A, B, C, D, h = (t.float() for t in operands((70,), heads=4, groups=2, d_state=5))
    rows = torch.cat([x.flatten(1), B.flatten(1), C.flatten(1), dt], dim=1)
    x_, B_, C_, dt_ = rows.split([12, 10, 10, 4], dim=1)
    sliced = scan((70,), "native")(
        x_.unflatten(1, (4, 3)), dt_, A, B_.unflatten(1, (2, 5)), C_.unflatten(1, (2, 5)), D, h
    )
    for a, e in zip(sliced, scan((70,), "native")(x, dt, A, B, C, D, h), strict=True):
        assert torch.equal(a, e)


def test_other_dtypes_keep_their_meaning():
    inputs = operands((20,))
    exact, _ = scan((20,), "torch")(*inputs)
    assert torch.equal(scan((20,), "auto")(*inputs)[0], exact)
    inputs[0] = inputs[0].float()  # steps, and so the states, stay float64
    y, final = scan((20,), "auto")(*inputs)
    assert (y.dtype, final.dtype) == (torch.float32, torch.float64)
    narrow = [t.float() for t in inputs]
    narrow[0] = randn(20, 4, 3, dtype=torch.bfloat16)
    y, final = scan((20,), "auto")(*narrow)
    assert (y.dtype, final.dtype) == (torch.bfloat16, torch.float32)
