"""The compiled convolution against the written-out one, at lengths and widths that fit no tile."""

import pytest
import torch

from nemotron3.ops.conv import causal_conv
from nemotron3.ops.segments import Segments
from tests.ops.contract import outputs_and_gradients
from tests.ops.native import assert_native_equals_reference, needs_compiler
from tests.ops.test_conv import convolution, operands
from tests.tolerances import FLOAT32

pytestmark = needs_compiler


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("lengths", [(1,), (2,), (130,), (3, 3), (1, 129, 2, 1), (128, 128)])
@pytest.mark.parametrize("taps", [1, 2, 4, 5])
@pytest.mark.parametrize("channels", [1, 16, 37])
def test_equals_reference(lengths, taps, channels, assert_close):
    inputs = operands(lengths, channels, taps)
    assert_native_equals_reference(lambda b: convolution(lengths, b), inputs, assert_close)


@pytest.mark.usefixtures("poisoned_memory")
def test_many_rows_without_bias(assert_close):
    """Enough elements for all threads to get some."""
    x, w, _, t = operands((300, 5, 200), channels=130)
    segments = Segments((300, 5, 200))
    assert_native_equals_reference(
        lambda b: (
            lambda x, w, t: causal_conv(x, w, None, segments=segments, conv_states=t, backend=b)
        ),
        [x, w, t],
        assert_close,
    )


def test_reads_columns_of_a_wider_stream(assert_close):
    """Inputs and gradients are slices of a projection's."""
    lengths = (9, 4)
    inputs = operands(lengths, channels=20)

    def sliced(backend):
        def call(x, w, b, t):
            wide = torch.cat([x, x, x], dim=1)
            y, conv_states = convolution(lengths, backend)(wide[:, 20:40], w, b, t)
            return y.repeat(1, 3)[:, 20:40], conv_states

        return call

    assert_native_equals_reference(sliced, inputs, assert_close)


def test_neighbours_change_no_bit():
    x, w, b, t = (v.float() for v in operands((150,), channels=33))
    other, *_, other_tail = (v.float() for v in operands((7,), channels=33))
    results = []
    for streams, conv_states, rows, row in (
        ([x], [t], slice(None), 0),
        ([other, x, other], [other_tail, t, other_tail], slice(7, -7), 1),
    ):
        lengths = tuple(len(stream) for stream in streams)
        leaves = [torch.cat(streams).requires_grad_(), torch.cat(conv_states).requires_grad_()]
        y, tail = convolution(lengths, "native")(leaves[0], w, b, leaves[1])
        ((y**2).sum() + (tail**2).sum()).backward()
        results.append([y[rows], tail[row], leaves[0].grad[rows], leaves[1].grad[row]])
    assert all(torch.equal(alone, packed) for alone, packed in zip(*results, strict=True))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("output", "wanted"), [*((0, wanted) for wanted in range(4)), (1, 0), (1, 3)]
)
def test_only_what_is_wanted(output, wanted, assert_close):
    """Frozen operands get no gradient, and either output may go unused."""
    inputs = operands((2, 130), channels=18)
    gradients = []
    for backend, dtype in (("reference", torch.float64), ("native", torch.float32)):
        leaves = [t.to(dtype, copy=True).requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        convolution((2, 130), backend)(*leaves)[output].sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert [grad is not None for grad in gradients[1]] == [i == wanted for i in range(4)]
    assert_close(gradients[1][wanted].double(), gradients[0][wanted], FLOAT32)


def test_a_whole_stream_equals_its_halves():
    """Bit for bit: the convolution states carry everything."""
    x, w, b, t = (v.float() for v in operands((40,), channels=17))
    whole, whole_tail = convolution((40,), "native")(x, w, b, t)
    first, tail = convolution((13,), "native")(x[:13], w, b, t)
    second, tail = convolution((27,), "native")(x[13:], w, b, tail)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(tail, whole_tail)


def test_a_broken_token_breaks_no_earlier_one():
    x, w, b, t = (v.float() for v in operands((10,), channels=5))
    x[6] = torch.nan
    y, _ = convolution((10,), "native")(x, w, b, t)
    assert y[6].isnan().all()
    assert not y[:6].isnan().any()


def test_without_gradients_the_same(assert_close):
    inputs = [v.float() for v in operands((5, 130), channels=18)]
    expected = outputs_and_gradients(convolution((5, 130), "native"), inputs)
    for actual, wanted in zip(convolution((5, 130), "native")(*inputs), expected, strict=False):
        assert torch.equal(actual, wanted)
