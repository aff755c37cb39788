"""Quantized weights: what they hold, and products with them against the matrix they stand for."""

import copy

import pytest
import torch

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.cross_entropy import linear_cross_entropy, token_logprobs
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.linear import linear, linear_parts
from nemotron3.ops.nvfp4 import quantize as to_nvfp4
from nemotron3.ops.weights import FORMATS, FP8Weight, Int8Weight, NVFP4Weight
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


def whole(kind, inputs):
    """At least so many inputs, in whole blocks."""
    return -(-inputs // kind.block) * kind.block


def random(kind, *shape):
    return quantized(kind, torch.randn(*shape[:-1], whole(kind, shape[-1])))


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


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_without_a_scale_are_refused(kind, value):
    matrix = torch.ones(3, 16)
    matrix[1, 2] = value
    with pytest.raises(OperandError, match=f"{kind.format}: .* not finite"):
        quantized(kind, matrix)


@every_format
def test_a_weight_is_quantized_once(kind):
    """The matrix that it stands for has the same values again, and so has a copy."""
    weight = random(kind, 3, 9, 20)
    again = quantized(kind, weight.dequantize())
    # Recovered from the largest value, a scale of a matrix may have one more rounding.
    assert torch.allclose(again.dequantize(), weight.dequantize(), rtol=3e-7, atol=0)
    assert torch.equal(kind.empty(weight.shape).copy_(weight).dequantize(), weight.dequantize())


@every_format
def test_zeros_and_subnormal_numbers_are_kept(kind):
    matrix = torch.zeros(3, 2, 32)
    matrix[1] = 1e-40
    matrix[2, 1, 5] = 3e38
    held = quantized(kind, matrix).dequantize()
    assert held.isfinite().all()
    assert not held[0].any()
    assert torch.allclose(held[2], matrix[2], rtol=1e-6)


def test_nvfp4_is_the_published_form():
    """Codes and scales are those of the format, for each matrix, and a file holds them as such."""
    matrices = torch.randn(3, 5, 48) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
    weight = quantized(NVFP4Weight, matrices)
    for own, matrix in zip(weight, matrices, strict=True):
        expected, parts = to_nvfp4(matrix), own.parts()
        assert torch.equal(own.dequantize(), expected.dequantize())
        assert torch.equal(parts["weight"], expected.codes)
        scales = (parts["weight_scale"], expected.block_scales)
        assert torch.equal(*(scale.view(torch.uint8) for scale in scales))
        assert torch.equal(parts["weight_scale_2"], expected.tensor_scale)
    large = quantized(NVFP4Weight, torch.randn(256, 1024))
    assert 4.5 < 8 * large.nbytes / matrices.new_empty(256, 1024).numel() < 4.54


def test_fp8_has_one_scale_for_a_matrix():
    matrices = torch.randn(2, 5, 7) * torch.tensor([1e-3, 50.0]).view(2, 1, 1)
    weight = quantized(FP8Weight, matrices)
    assert torch.equal(weight.scales, (matrices.abs().amax((1, 2)) / 448).view(2, 1).expand(2, 5))
    off = (weight.dequantize() - matrices).abs() / matrices.abs().clamp(min=0.01)
    assert off.max() < 2**-4
    assert weight[1].parts()["weight_scale"].shape == ()


def test_inputs_that_are_no_whole_blocks_are_refused():
    for make in (NVFP4Weight.empty, lambda shape: NVFP4Weight.empty(torch.Size((2, *shape)))):
        with pytest.raises(OperandError, match="nvfp4: 20 inputs are not divisible by 16"):
            make(torch.Size((3, 20)))


@every_format
def test_parts_are_read_again_to_the_bit(kind):
    weight = random(kind, 9, 20)
    for extend in (lambda t: t, lambda t: t.reshape(1) if t.dim() == 0 else t):
        other = random(kind, 9, 20)
        for name, part in weight.parts().items():
            other.load_part(name, extend(part.clone()))
        for own, expected in zip(other.buffers(), weight.buffers(), strict=True):
            assert torch.equal(own.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", [FP8Weight, NVFP4Weight])
def test_stacked_matrices_keep_scales_of_their_own(kind):
    gate, value = torch.randn(4, 32), 30 * torch.randn(4, 32)
    weight = kind.empty(torch.Size((8, 32)))
    for rows, matrix in ((weight[:4], gate), (weight[4:], value)):
        rows.copy_(matrix)
        assert all(part.shape != (4,) for part in rows.parts().values())
        assert torch.equal(rows.dequantize(), quantized(kind, matrix).dequantize())
    last = list(weight.parts().values())[-1]
    assert last.shape == (8,)
    again = kind.empty(weight.shape)
    for name, part in weight.parts().items():
        again.load_part(name, part)
    assert torch.equal(again.dequantize(), weight.dequantize())


@every_format
@pytest.mark.parametrize("conversion", ["half", "bfloat16", "double", "deepcopy", "float"])
def test_conversions_change_no_value(kind, conversion):
    weight = random(kind, 9, 20)
    expected = weight.dequantize()
    holder = torch.nn.ModuleList([weight])
    holder = copy.deepcopy(holder) if conversion == "deepcopy" else getattr(holder, conversion)()
    assert torch.equal(holder[0].dequantize(), expected)
    assert {k: v.dtype for k, v in holder.state_dict().items()} == {
        f"0.{k}": v.dtype for k, v in random(kind, 9, 20).state_dict().items()
    }


@every_format
def test_a_part_is_in_the_same_memory(kind):
    weight = random(kind, 3, 8, 20)
    matrix = torch.randn(4, weight.shape[-1])
    weight[1][4:].copy_(matrix)
    assert torch.equal(weight.dequantize()[1, 4:], quantized(kind, matrix).dequantize())
    assert [part.shape for part in weight] == [weight.shape[1:]] * 3


@every_backend("linear")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 9, 16, 131])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 7), (16, 64), (67, 129), (130, 300)])
def test_linear_is_that_with_the_matrix(kind, backend, rows, outputs, inputs, assert_close):
    weight = random(kind, outputs, inputs)
    inputs = weight.shape[1]
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
    weight = random(kind, 10, 7)
    x = torch.randn(2, 3, weight.shape[1])
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
    d, width = whole(kind, d), whole(kind, width)
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
    weight, targets = random(kind, 30, 16), torch.randint(30, (9,))
    gradients = []
    for matrix in (weight, weight.dequantize()):
        torch.manual_seed(1)
        hidden = torch.randn(9, 16, requires_grad=True)
        linear_cross_entropy(hidden, matrix, targets, torch.ones(9)).total.backward()
        token_logprobs(hidden, matrix, targets).square().sum().backward()
        gradients.append(hidden.grad)
    assert torch.equal(*gradients)


@every_format
def test_mistakes_are_named(kind):
    weight, x = random(kind, 10, 16), torch.randn(3, 16)
    with pytest.raises(OperandError, match=r"weight has shape \[10, 16\]; expected \[10, 15\]"):
        linear(x[:, 1:], weight)
    with pytest.raises(OperandError, match=r"weight has shape \[2, 4, 16\]; expected \[d_out"):
        linear(x, random(kind, 2, 4, 16))
    with pytest.raises(OperandError, match=r"x has dtype torch\.int64"):
        linear(x.long(), weight)
    up, down = random(kind, 4, 32, 16), torch.randn(4, 16, 32)
    chosen = torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with pytest.raises(OperandError, match=f"up is {kind.format} and down plain"):
        routed_experts(x, *chosen, up, down, activation="relu2")
    with pytest.raises(OperandError, match=r"up has shape \[4, 32, 16\]"):
        routed_experts(x, *chosen, up, quantized(kind, down), activation="swiglu")


@pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_every_code_is_decoded(rows, assert_close):
    """All numbers of E4M3 and E2M1 under all block scales, by both ways of multiplying."""
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    eight = FP8Weight.empty(torch.Size((16, 254)))
    eight.codes.view(torch.uint8).copy_(torch.tensor(finite, dtype=torch.uint8))
    eight.scales.copy_(torch.linspace(0.5, 2.0, 16))
    positive = torch.arange(0x7F, dtype=torch.uint8)
    four = NVFP4Weight.empty(torch.Size((127, 32)))
    four.codes.copy_(torch.randint(256, four.codes.shape, dtype=torch.uint8))
    four.codes[:, :8] = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE])
    four.block_scales.view(torch.uint8).copy_(positive.unsqueeze(-1))
    four.tensor_scales.fill_(0.125)
    for weight in (eight, four):
        x = torch.randn(rows, weight.shape[1])
        expected = x.double() @ weight.dequantize(torch.float64).T
        found = linear(x, weight, backend="native").double()
        # Row by row: rows of small scales would be nothing beside those of large ones.
        for own, wanted in zip(found.T, expected.T, strict=True):
            assert_close(own, wanted, FLOAT32)
    one = torch.eye(254)
    assert torch.equal(linear(one, eight, backend="native").T, eight.dequantize())
