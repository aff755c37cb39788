"""Compiled operations of bfloat16 against float64 of the same numbers, at odd sizes."""

import subprocess
import sys

import pytest
import torch

from nemotron3.ops import native
from nemotron3.ops.attention import attention, attention_steps
from nemotron3.ops.conv import causal_conv_steps
from nemotron3.ops.cross_entropy import linear_cross_entropy
from nemotron3.ops.experts import activate, routed_experts
from nemotron3.ops.graph import Graph
from nemotron3.ops.linear import linear, linear_parts
from nemotron3.ops.norm import gated_group_norm, rms_norm
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd import ssd, ssd_steps
from tests.ops.contract import randn
from tests.ops.native import assert_bfloat16_equals_reference, needs_compiler
from tests.ops.test_conv import convolution
from tests.ops.test_conv import operands as conv_operands
from tests.ops.test_experts import mixture
from tests.ops.test_experts import operands as expert_operands
from tests.ops.test_ssd_native import operands as scan_operands
from tests.tolerances import BFLOAT16

pytestmark = [needs_compiler, pytest.mark.usefixtures("poisoned_memory")]


def scaled(*shape):
    """Numbers whose products with others of a size around one are of a size around one."""
    return randn(*shape) * shape[-1] ** -0.5


def product(backend):
    return lambda x, w: [linear(x, w, backend=backend)]


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 17, 241])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (67, 129), (130, 300)])
@pytest.mark.parametrize("wide", [(), (1,)])
def test_dense_products(rows, outputs, inputs, wide, assert_close):
    operands = [randn(rows, inputs), scaled(outputs, inputs)]
    assert_bfloat16_equals_reference(product, operands, assert_close, wide=wide)


@pytest.mark.parametrize("shape", [(1000, 70, 1100), (130, 1100, 70), (521, 600, 531)])
def test_dense_products_go_over_blocks_whole(shape, assert_close):
    rows, outputs, inputs = shape
    operands = [randn(rows, inputs), scaled(outputs, inputs)]
    assert_bfloat16_equals_reference(product, operands, assert_close, wide=(1,))


@pytest.mark.parametrize("sizes", [[1, 699], [130, 300, 270], [257, 1, 1, 441]])
def test_parts_of_a_product(sizes, assert_close):
    operands = [randn(33, 140), scaled(700, 140)]
    assert_bfloat16_equals_reference(
        lambda b: lambda x, w: linear_parts(x, w, sizes, backend=b), operands, assert_close
    )


def test_a_float32_weight_is_rounded_as_its_copy_would_be():
    for rows in (3, 40):
        x, weight = torch.randn(rows, 70).bfloat16(), torch.randn(50, 70)
        assert torch.equal(linear(x, weight), linear(x, weight.bfloat16()))


def test_sums_are_float32():
    """A thousand numbers of which bfloat16 could not add the last."""
    x, weight = torch.ones(20, 1001).bfloat16(), torch.ones(3, 1001).bfloat16()
    assert (linear(x, weight) == torch.tensor(1001.0).bfloat16()).all()
    assert (linear(x[:2], weight) == torch.tensor(1001.0).bfloat16()).all()


def test_nan_and_infinity_arrive_and_numbers_round_to_even():
    x, weight = torch.ones(10, 41).bfloat16(), torch.ones(20, 41).bfloat16()
    x[3, 5], x[4, 5] = torch.nan, torch.inf
    y = linear(x, weight)
    assert y[3].isnan().all()
    assert y[4].isinf().all()
    assert (y[:3] == 41).all()
    numbers = torch.randn(1000, 1)
    one = torch.ones(1, 1).bfloat16()
    assert torch.equal(linear(numbers.bfloat16(), one), numbers.bfloat16())
    assert torch.equal(linear(one, numbers).flatten(), numbers.bfloat16().flatten())


@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 4, 1), (9, 4, 2), (25, 4, 2), (3, 16, 3), (150, 2, 2)]
)
@pytest.mark.parametrize(("d", "width"), [(6, 5), (33, 70)])
@pytest.mark.parametrize(("activation", "up_rows"), [("relu2", 1), ("swiglu", 2)])
@pytest.mark.parametrize("wide", [(1,), (1, 2, 3)])
def test_experts(tokens, experts, k, d, width, activation, up_rows, wide, assert_close):
    indices, (x, weights, up, down) = expert_operands(tokens, experts, k, d, width, up_rows)
    inputs = [x, weights, up * d**-0.5, down * width**-0.5]
    assert_bfloat16_equals_reference(
        lambda b: mixture(indices, activation, b), inputs, assert_close, wide=wide
    )


def test_an_expert_nobody_chose_gets_zero_gradient():
    up = torch.randn(4, 8, 6, requires_grad=True)
    down = torch.randn(4, 6, 8, requires_grad=True)
    x, weights = torch.randn(30, 6).bfloat16(), torch.rand(30, 2)
    indices = torch.tensor([0, 1]).expand(30, 2).contiguous()
    routed_experts(x, indices, weights, up, down, activation="relu2").sum().backward()
    assert (up.grad[2:] == 0).all()
    assert (down.grad[2:] == 0).all()


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_activation(activation, assert_close):
    assert_bfloat16_equals_reference(
        lambda b: lambda h: [activate(h, activation, backend=b)], [randn(30, 70)], assert_close
    )


@pytest.mark.parametrize(("rows", "width", "groups"), [(1, 7, 1), (130, 66, 3), (65, 256, 4)])
@pytest.mark.parametrize("wide", [(), (2,)])
def test_norms(rows, width, groups, wide, assert_close):
    x, gate, weight = randn(rows, width), randn(rows, width), randn(width)
    assert_bfloat16_equals_reference(
        lambda b: lambda *t: [gated_group_norm(*t, groups=groups, eps=1e-5, backend=b)],
        [x, gate, weight],
        assert_close,
        wide=wide,
    )
    assert_bfloat16_equals_reference(
        lambda b: lambda *t: [rms_norm(*t, 1e-5, backend=b)],
        [x, weight],
        assert_close,
        wide=[i - 1 for i in wide],
    )


@pytest.mark.parametrize("lengths", [(1,), (2,), (3, 130, 1)])
@pytest.mark.parametrize(("channels", "taps"), [(1, 4), (37, 3), (40, 4)])
def test_convolution(lengths, channels, taps, assert_close):
    inputs = conv_operands(lengths, channels, taps)
    assert_bfloat16_equals_reference(lambda b: convolution(lengths, b), inputs, assert_close)


@pytest.mark.parametrize("lengths", [(1,), (47,), (200,), (5, 1, 97, 49)])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (8, 2), (3, 1)])
@pytest.mark.parametrize(("head_dim", "d_state"), [(5, 16), (33, 17)])
def test_scan(lengths, heads, groups, head_dim, d_state, assert_close):
    inputs = scan_operands(lengths, heads, head_dim, groups, d_state)
    segments = Segments(lengths)

    def call(backend):
        return lambda *t: ssd(
            *t[:6], segments=segments, chunk_size=8, initial_states=t[6], backend=backend
        )

    wide = (1, 2, 5, 6)  # step sizes, rates and states
    assert_bfloat16_equals_reference(call, inputs, assert_close, wide=wide)


@pytest.mark.parametrize(
    ("queries", "keys"), [((1,), (1,)), ((200, 3, 49), (200, 3, 49)), ((64, 7), (64, 300))]
)
@pytest.mark.parametrize("head_dim", [1, 40])
def test_attention(queries, keys, head_dim, assert_close):
    inputs = [randn(sum(n), heads, head_dim) for n, heads in ((queries, 4), (keys, 2), (keys, 2))]
    segments = {"queries": Segments(queries), "keys": Segments(keys)}
    assert_bfloat16_equals_reference(
        lambda b: lambda *t: [attention(*t, **segments, backend=b)], inputs, assert_close
    )


@pytest.mark.parametrize(("tokens", "vocab", "width"), [(1, 3, 5), (70, 131, 33)])
@pytest.mark.parametrize("wide", [(), (1,)])
def test_cross_entropy(tokens, vocab, width, wide, assert_close):
    targets, weights = torch.randint(vocab, (tokens,)), torch.rand(tokens)

    def call(backend):
        return lambda h, w: [
            linear_cross_entropy(h, w, targets, weights.to(h.dtype), backend=backend).total
        ]

    inputs = [randn(tokens, width), scaled(vocab, width)]
    weights = weights.bfloat16()
    assert_bfloat16_equals_reference(call, inputs, assert_close, wide=wide)


@pytest.mark.parametrize("pool", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_equal_those_of_torch(dtype, pool, assert_close):
    """Also where the carried state has another dtype than the activations."""
    slots, lengths = torch.tensor([2, 0]), torch.tensor([5, 3])
    x, weight, states = randn(6, 40), randn(40, 4), randn(3, 3, 40)
    q, k, v = randn(6, 4, 24), randn(6, 2, 24), randn(6, 2, 24)
    keys, values = randn(4, 8, 2, 24), randn(4, 8, 2, 24)
    table = torch.tensor([[0, 1], [0, 0], [2, 3]])
    results = []
    for backend in ("native", "torch"):
        held = [t.to(pool) for t in (states, keys, values)]
        y = causal_conv_steps(
            x.to(dtype), weight.to(dtype), None,
            conv_states=held[0], slots=slots, backend=backend,
        )  # fmt: skip
        z = attention_steps(
            *(t.to(dtype) for t in (q, k, v)),
            keys=held[1], values=held[2], table=table, slots=slots, cached_lengths=lengths,
            backend=backend,
        )  # fmt: skip
        assert y.dtype == z.dtype == dtype
        results.append([t.float() for t in (y, z, *held)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, BFLOAT16)


def test_scan_steps_equal_those_of_float32(assert_close):
    x, dt, A, B, C, D, states = (t.float() for t in scan_operands((6,), 4, 5, 2, 17))
    x, B, C = (t.bfloat16() for t in (x, B, C))
    states = torch.stack([states[0]] * 3)
    slots = torch.tensor([2, 0])
    results = []
    for cast in (lambda t: t, lambda t: t.float()):
        held = states.clone()
        y = ssd_steps(cast(x), dt, A, cast(B), cast(C), D, held, slots, backend="native")
        results.append((y, held))
    (y, held), (wide, expected) = results
    assert y.dtype == torch.bfloat16
    assert torch.equal(held, expected)
    assert torch.equal(y, wide.bfloat16())


def test_a_recording_replays_casts_sums_and_embeddings_as_compiled_code():
    table = torch.randn(9, 33).bfloat16()
    tokens, other = torch.tensor([3, 4]), torch.tensor([8, 0])

    def function(tokens):
        x = torch.nn.functional.embedding(tokens, table)
        wide = x[:, 5:20].float()
        return x + x, wide, (wide * 1.7).bfloat16()

    graph = Graph()
    with torch.no_grad(), graph.record():
        results = function(tokens)
    tokens.copy_(other)
    graph.replay()
    for replayed, expected in zip(results, function(other), strict=True):
        assert torch.equal(replayed, expected)


_WITHOUT = """
import logging, torch
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from nemotron3.ops import native
from nemotron3.ops.linear import linear
assert not native.multiplies_bfloat16()
generator = torch.Generator().manual_seed(0)
for rows in (3, 50):
    x = torch.randn(rows, 70, generator=generator).bfloat16().requires_grad_()
    w = torch.randn(40, 70, generator=generator).requires_grad_()
    y = linear(x, w, backend="native")
    y.sum().backward()
    y = y.detach()
    exact = x.detach().double() @ w.detach().bfloat16().double().T
    assert ((y.double() - exact).abs().max() / exact.abs().max()) < 1e-2
    column = x.detach().float().sum(0).expand(40, 70)
    assert ((w.grad - column).abs().max() / column.abs().max()) < 1e-4
"""


@pytest.mark.slow
def test_a_processor_without_the_instructions_computes_in_float32_and_says_so(tmp_path):
    environment = {
        "NEMOTRON3_CXXFLAGS": "-mno-avx512bf16",
        "XDG_CACHE_HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
    }
    command = [sys.executable, "-c", _WITHOUT]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("has no instructions for bfloat16") == 1


def test_whether_the_processor_has_the_instructions_is_known():
    assert native.multiplies_bfloat16() in (True, False)
