"""Products with a quantized weight and its low-rank change, against the matrix that both make."""

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.models.adapted_weight import AdaptedWeight
from nemotron3.ops import native
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.linear import linear, linear_low_rank
from nemotron3.ops.products import dense
from nemotron3.ops.weights import FORMATS, LowRankWeight
from tests.ops.test_weights import quantized, random, whole
from tests.tolerances import FLOAT32, FLOAT64

every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())
BACKENDS = ["reference", "torch", *(["native"] if native.available() else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
TOLERANCE = {torch.float32: FLOAT32, torch.float64: FLOAT64}


def dtype_of(backend):
    return torch.float32 if backend == "native" else torch.float64


def changed(base, rank, dtype, scale=0.7):
    *experts, d_out, d_in = base.shape
    A = torch.randn(*experts, rank, d_in).to(dtype) / d_in**0.5
    B = torch.randn(*experts, d_out, rank).to(dtype) / max(rank, 1) ** 0.5
    return LowRankWeight(base, A.requires_grad_(), B.requires_grad_(), scale)


def definition(weight):
    """The matrix in float64, with leaves of its own for A and B."""
    A, B = (t.detach().double().requires_grad_() for t in (weight.A, weight.B))
    product = torch.einsum("...or,...ri->...oi", B, A)
    return weight.base.dequantize(torch.float64) + weight.scale * product, A, B


@every_format
@every_backend
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [0, 3, 70])
@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(1, 1, 1), (5, 7, 3), (130, 300, 70)])
def test_dense_products(kind, backend, rows, outputs, inputs, rank, assert_close):
    dtype = dtype_of(backend)
    weight = changed(random(kind, outputs, inputs), rank, dtype)
    x = torch.randn(rows, weight.shape[1]).to(dtype).requires_grad_()
    dy = torch.randn(rows, outputs).to(dtype)
    y = linear_low_rank(x, weight, backend=backend)
    found = torch.autograd.grad(y, (x, weight.A, weight.B), dy)
    with torch.no_grad():
        alone = linear_low_rank(x, weight, backend=backend)
    matrix, A, B = definition(weight)
    wide = x.detach().double().requires_grad_()
    expected = wide @ matrix.T
    gradients = torch.autograd.grad(expected, (wide, A, B), dy.double())
    for ours, theirs in zip(
        (y.detach(), alone, *found), (*[expected.detach()] * 2, *gradients), strict=True
    ):
        assert_close(ours.double(), theirs, 2 * TOLERANCE[dtype])


@every_format
@every_backend
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "which"),
    [(0, 4, 2, "both"), (1, 4, 1, "up"), (9, 4, 2, "down"), (30, 2, 2, "both"), (3, 16, 3, "both")],
)
@pytest.mark.parametrize(
    ("d", "width", "activation", "factor"), [(6, 5, "swiglu", 2), (33, 70, "relu2", 1)]
)
def test_routed_experts(
    kind, backend, tokens, experts, k, d, width, activation, factor, which, assert_close
):
    dtype, d, width = dtype_of(backend), whole(kind, d), whole(kind, width)
    up = quantized(kind, torch.randn(experts, factor * width, d) / d**0.5)
    down = quantized(kind, torch.randn(experts, d, width) / width**0.5)
    ours = [
        changed(base, rank, dtype) if which in (name, "both") else base
        for name, base, rank in (("up", up, 3), ("down", down, 5))
    ]
    theirs = [definition(w) if isinstance(w, LowRankWeight) else None for w in ours]
    matrices = [
        base.dequantize(torch.float64) if made is None else made[0]
        for base, made in zip((up, down), theirs, strict=True)
    ]
    indices = torch.rand(tokens, experts).topk(k).indices
    x, weights = torch.randn(tokens, d), torch.rand(tokens, k)
    dy = torch.randn(tokens, d)
    results = []
    for kept, changes, to, chosen in (
        (ours, [(w.A, w.B) for w in ours if isinstance(w, LowRankWeight)], dtype, backend),
        (matrices, [made[1:] for made in theirs if made], torch.float64, "reference"),
    ):
        operands = [t.to(to).requires_grad_() for t in (x, weights)]

        def mixture(operands=operands, kept=kept, chosen=chosen):
            return routed_experts(
                operands[0], indices, operands[1], *kept, activation=activation, backend=chosen
            )

        y = mixture()
        with torch.no_grad():
            alone = mixture()
        leaves = [*operands, *(part for pair in changes for part in pair)]
        gradients = torch.autograd.grad(y, leaves, dy.to(to), materialize_grads=True)
        results.append([y.detach(), alone, *gradients])
    for found, expected in zip(*results, strict=True):
        assert_close(found.double(), expected, 3 * TOLERANCE[dtype])


@pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
@every_format
def test_gradients_of_inputs_go_through_many_tiles(kind, assert_close):
    """More rows, outputs and inputs than a block has, and none a whole number of blocks."""
    weight = random(kind, 300, 1100)
    x = torch.zeros(601, weight.shape[1], requires_grad=True)
    dy = torch.randn(601, 2 * 300)[:, ::2]
    [dx] = torch.autograd.grad(linear(x, weight, backend="native"), x, dy)
    assert_close(dx.double(), dy.double() @ weight.dequantize(torch.float64), FLOAT32)


def test_bfloat16_rounds_each_product(assert_close):
    base = random(FORMATS["nvfp4"], 40, 64)
    weight = AdaptedWeight(base, rank=4, scale=0.7)
    with torch.no_grad():
        for part in (weight.A, weight.B):
            part.copy_(0.3 * torch.randn(part.shape))
    x = torch.randn(9, 64).bfloat16()
    parts = dense(x, weight, [30, 10])
    assert [part.dtype for part in parts] == [torch.bfloat16] * 2
    y = torch.cat(parts, -1)
    y.float().sum().backward()
    assert weight.A.grad.dtype == weight.B.grad.dtype == torch.float32
    matrix, *_ = definition(weight.operand(torch.bfloat16))
    assert_close(y.double().detach(), (x.double() @ matrix.T).detach(), 0.02)


@every_format
def test_mistakes_are_named(kind):
    x = torch.randn(3, 16)
    weight = changed(random(kind, 10, 16), 2, torch.float32)
    with pytest.raises(OperandError, match=r"weight has shape \[10, 16\]; expected \[10, 15\]"):
        linear_low_rank(x[:, 1:], weight)
    wrong = LowRankWeight(weight.base, weight.A[:, :8], weight.B, 1.0)
    with pytest.raises(OperandError, match=r"A has shape \[2, 8\]"):
        linear_low_rank(x, wrong)
    up = changed(random(kind, 4, 32, 16), 2, torch.float32)
    chosen = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(OperandError, match=f"up is {kind.format} and down plain"):
        routed_experts(x, *chosen, up, torch.randn(4, 16, 32), activation="relu2")
