"""Quantized weights: what they hold, and products with them against the matrix they stand for."""

import copy

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.cross_entropy import linear_cross_entropy, token_logprobs
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.linear import linear, linear_parts
from nemotron3.ops.weights import FORMATS, Int8Weight
from tests.ops.contract import randn
from tests.tolerances import FLOAT32, FLOAT64

every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS.keys())


def every_backend(operation):
    """Every format on every backend that it has for an operation and that runs here."""
    cases = [
        pytest.param(kind, backend, id=f"{name}-{backend}")
        for name, kind in FORMATS.items()
        for backend in getattr(kind, operation)
        if backend != "triton" and (backend != "native" or native.available())
    ]
    return pytest.mark.parametrize(("kind", "backend"), cases)


def quantized(kind, matrix):
    return kind.empty(matrix.shape).copy_(matrix)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 5, 7), (40, 300)])
def test_int8_is_half_a_step_off_at_most(shape):
    matrix = torch.randn(shape) * torch.logspace(-6, 6, shape[-2]).unsqueeze(-1)
    weight = Int8Weight.quantize(matrix)
    off = (weight.dequantize().double() - matrix.double()).abs()
    assert (off <= 0.5001 * weight.scales.unsqueeze(-1)).all()
    assert (weight.codes.abs().amax(-1) == 127).all()
    assert weight.nbytes == matrix.numel() + 4 * matrix[..., 0].numel()


def test_int8_of_extreme_rows():
    matrix = torch.zeros(4, 6)
    matrix[1] = 1e-45  # its scale underflows
    matrix[2, 3] = 1e38
    matrix[3] = torch.tensor([-0.0, 2.5, -2.5, 1e-30, -127.0, 127.0])
    held = Int8Weight.quantize(matrix).dequantize()
    assert torch.isfinite(held).all()
    assert not held[0].any()
    assert torch.allclose(held[2:], matrix[2:], rtol=1e-6, atol=0.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_int8_refuses_values_without_a_scale(value):
    matrix = torch.ones(3, 4)
    matrix[1, 2] = value
    with pytest.raises(OperandError, match="not finite"):
        Int8Weight.quantize(matrix)


@every_format
def test_a_weight_is_quantized_once(kind):
    """The matrix that it stands for has the same codes again, and so has a copy."""
    weight = quantized(kind, torch.randn(3, 9, 20))
    again = quantized(kind, weight.dequantize())
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert torch.equal(kind.empty(weight.shape).copy_(weight).dequantize(), weight.dequantize())


@every_format
@pytest.mark.parametrize("conversion", ["half", "bfloat16", "double", "deepcopy", "float"])
def test_conversions_change_no_value(kind, conversion):
    weight = quantized(kind, torch.randn(9, 20))
    expected = weight.dequantize()
    holder = torch.nn.ModuleList([weight])
    holder = copy.deepcopy(holder) if conversion == "deepcopy" else getattr(holder, conversion)()
    assert torch.equal(holder[0].dequantize(), expected)
    assert {k: v.dtype for k, v in holder.state_dict().items()} == {
        f"0.{k}": v.dtype for k, v in quantized(kind, torch.randn(9, 20)).state_dict().items()
    }


@every_format
def test_a_part_is_in_the_same_memory(kind):
    weight = quantized(kind, torch.randn(3, 8, 20))
    matrix = torch.randn(4, 20)
    weight[1][4:].copy_(matrix)
    assert torch.equal(weight.dequantize()[1, 4:], quantized(kind, matrix).dequantize())
    assert [part.shape for part in weight] == [torch.Size((8, 20))] * 3


@every_backend("linear")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9, 16, 131])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (16, 64), (67, 129), (130, 300)])
def test_linear_is_that_with_the_matrix(kind, backend, rows, outputs, inputs, assert_close):
    weight = quantized(kind, torch.randn(outputs, inputs))
    dtype = torch.float32 if backend == "native" else torch.float64
    x, dy = randn(rows, inputs).to(dtype).requires_grad_(), randn(rows, outputs).to(dtype)
    y = linear(x, weight, backend=backend)
    [dx] = torch.autograd.grad(y, x, dy)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, backend=backend), y)
    matrix = weight.dequantize(torch.float64)
    tolerance = FLOAT32 if backend == "native" else FLOAT64
    assert_close(y.detach().double(), x.detach().double() @ matrix.T, tolerance)
    assert_close(dx.double(), dy.double() @ matrix, tolerance)


@every_backend("linear")
def test_linear_in_parts_and_batches(kind, backend):
    weight, x = quantized(kind, torch.randn(10, 7)), torch.randn(2, 3, 7)
    whole = linear(x, weight, backend=backend)
    assert whole.shape == (2, 3, 10)
    parts = linear_parts(x, weight, [1, 6, 3], backend=backend)
    assert torch.equal(torch.cat(parts, -1), whole)
    assert linear(x[0, 0], weight, backend=backend).shape == (10,)


@every_backend("routed_experts")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(0, 4, 2), (1, 4, 1), (9, 4, 2), (25, 4, 2), (3, 16, 3), (90, 2, 2)],
)
@pytest.mark.parametrize(("d", "width"), [(6, 5), (16, 32), (33, 70)])
@pytest.mark.parametrize(("activation", "factor"), [("relu2", 1), ("swiglu", 2)])
def test_experts_are_those_with_the_matrices(
    kind, backend, tokens, experts, k, d, width, activation, factor, assert_close
):
    up = quantized(kind, torch.randn(experts, factor * width, d) / d**0.5)
    down = quantized(kind, torch.randn(experts, d, width) / width**0.5)
    indices = torch.rand(tokens, experts).topk(k).indices
    results = []
    for dtype, matrices, chosen in (
        (torch.float32 if backend == "native" else torch.float64, (up, down), backend),
        (torch.float64, [w.dequantize(torch.float64) for w in (up, down)], "reference"),
    ):
        torch.manual_seed(1)
        operands = torch.randn(tokens, d).to(dtype), torch.rand(tokens, k).to(dtype)
        x, weights = (t.requires_grad_() for t in operands)
        dy = torch.randn(tokens, d).to(dtype)

        def mixture(x=x, weights=weights, matrices=matrices, chosen=chosen):
            return routed_experts(
                x, indices, weights, *matrices, activation=activation, backend=chosen
            )

        y = mixture()
        with torch.no_grad():
            alone = mixture()
        results.append([y.detach(), alone, *torch.autograd.grad(y, (x, weights), dy)])
    tolerance = FLOAT32 if backend == "native" else FLOAT64
    for actual, expected in zip(*results, strict=True):
        assert_close(actual.double(), expected, tolerance)


@every_format
def test_losses_have_the_gradient_of_hidden_states(kind):
    weight, targets = quantized(kind, torch.randn(30, 12)), torch.randint(30, (9,))
    gradients = []
    for matrix in (weight, weight.dequantize()):
        torch.manual_seed(1)
        hidden = torch.randn(9, 12, requires_grad=True)
        linear_cross_entropy(hidden, matrix, targets, torch.ones(9)).total.backward()
        token_logprobs(hidden, matrix, targets).square().sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@every_format
def test_mistakes_are_named(kind):
    weight, x = quantized(kind, torch.randn(10, 7)), torch.randn(3, 7)
    with pytest.raises(OperandError, match=r"weight has shape \[10, 7\]; expected \[10, 6\]"):
        linear(x[:, 1:], weight)
    with pytest.raises(OperandError, match=r"weight has shape \[2, 4, 5\]; expected \[d_out"):
        linear(x, quantized(kind, torch.randn(2, 4, 5)))
    with pytest.raises(OperandError, match=r"x has dtype torch\.int64"):
        linear(x.long(), weight)
    up, down = quantized(kind, torch.randn(4, 6, 7)), torch.randn(4, 7, 6)
    chosen = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(OperandError, match=f"up is {kind.format} and down plain"):
        routed_experts(x, *chosen, up, down, activation="relu2")
    with pytest.raises(OperandError, match=r"up has shape \[4, 6, 7\]"):
        routed_experts(x, *chosen, up, quantized(kind, down), activation="swiglu")
