"""Products with rounded operands, against ordinary products of operands that are rounded apart."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from nemotron3.errors import OperandError
from nemotron3.models.nvfp4_recipe import NVFP4Config
from nemotron3.ops import mxfp8
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.linear import linear, linear_parts
from nemotron3.ops.low_precision import (
    ExpertsQuantization,
    OperandFormat,
    Operands,
    ProductFormats,
    ProductQuantization,
    RoundingPosition,
)
from nemotron3.ops.nvfp4 import SIGNS, fake_quantize
from nemotron3.ops.rounding import Noise
from nemotron3.ops.weights import Int8Weight
from tests.ops.native import needs_compiler
from tests.tolerances import FLOAT32

BACKENDS = ["reference", "torch", pytest.param("native", marks=needs_compiler)]
MX = OperandFormat(element="mxfp8")
MXFP8 = ProductFormats(fprop=Operands(MX, MX), dgrad=Operands(MX, MX), wgrad=Operands(MX, MX))
PRODUCTS = ("fprop", "dgrad", "wgrad")


def quantization(config=None, *, step=3, first_token=0, module="in_proj", formats=None):
    formats = formats or (config or NVFP4Config()).formats()
    position = RoundingPosition(step, first_token)
    return ProductQuantization(formats, 5, 7, module, position)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape[0], 1, generator=generator).exp()
    return torch.randn(*shape, generator=generator) * spread


def gradients(x, w, dy, q, backend, sizes=None):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    if sizes is None:
        y = linear(x, w, quantization=q, backend=backend)
    else:
        y = torch.cat(linear_parts(x, w, sizes, quantization=q, backend=backend), -1)
    return y.detach(), *torch.autograd.grad(y, (x, w), dy)


def noise(tensor, rows):
    return Noise(5, 3, 7, f"in_proj {tensor}", rows=rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_recipe_is_the_published_table(backend, assert_close):
    """Every operand as the table of Transformer Engine's recipe has it (docs/nvfp4.md)."""
    x, w, dy = randn(32, 48), randn(64, 48, seed=1), randn(32, 64, seed=2)
    y, dx, dw = gradients(x, w, dy, quantization(), backend)
    signs, rows = torch.tensor(SIGNS).float(), torch.arange(32)
    weight = fake_quantize(w, "tiles")
    assert_close(y, fake_quantize(x) @ weight.T, FLOAT32)
    rounded = fake_quantize(dy, "rows", "stochastic", noise=noise("dgrad dy", rows))
    assert_close(dx, rounded @ weight, FLOAT32)
    rounded = fake_quantize(dy, "columns", "stochastic", noise=noise("wgrad dy", rows), signs=signs)
    assert_close(dw, rounded.T @ fake_quantize(x, "columns", signs=signs), FLOAT32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mxfp8_rounds_every_operand_along_the_sum(backend, assert_close):
    x, w, dy = randn(32, 64), randn(96, 64, seed=1), randn(32, 96, seed=2)
    y, dx, dw = gradients(x, w, dy, quantization(formats=MXFP8), backend)
    assert_close(y, mxfp8.fake_quantize(x) @ mxfp8.fake_quantize(w).T, FLOAT32)
    assert_close(dx, mxfp8.fake_quantize(dy) @ mxfp8.fake_quantize(w, "columns"), FLOAT32)
    columns = mxfp8.fake_quantize(dy, "columns"), mxfp8.fake_quantize(x, "columns")
    assert_close(dw, columns[0].T @ columns[1], FLOAT32)


@pytest.mark.parametrize("config", [
    NVFP4Config(),
    NVFP4Config(weights="1d"),
    NVFP4Config(weights="1d", scales="four_over_six"),
    NVFP4Config(transform="none"),
    NVFP4Config(gradients="nearest"),
    NVFP4Config(gradients="ms_eden"),
    *(NVFP4Config(products=(product,)) for product in PRODUCTS),
], ids=str)  # fmt: skip
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(48, 32, 64), (1, 16, 8), (37, 48, 40)])
@pytest.mark.usefixtures("poisoned_memory")
def test_backends_agree(config, rows, inputs, outputs, assert_close):
    x, w = randn(rows, inputs), randn(outputs, inputs, seed=1)
    dy, sizes = randn(rows, outputs, seed=2), [outputs - 3, 3]
    expected = gradients(x, w, dy, quantization(config), "reference")
    for backend in ("torch", "auto"):
        found = gradients(x, w, dy, quantization(config), backend, sizes)
        for a, e in zip(found, expected, strict=True):
            assert_close(a, e, FLOAT32)


@pytest.mark.parametrize("product", PRODUCTS)
def test_products_that_are_left_out_are_ordinary(product, assert_close):
    x, w, dy = randn(32, 48), randn(64, 48, seed=1), randn(32, 64, seed=2)
    found = gradients(x, w, dy, quantization(NVFP4Config(products=(product,))), "auto")
    ordinary = x @ w.T, dy @ w, dy.T @ x
    for name, a, e in zip(PRODUCTS, found, ordinary, strict=True):
        if name == product:
            assert 0.02 < (a - e).norm() / e.norm() < 0.4
        else:
            assert_close(a, e, FLOAT32)


@pytest.mark.parametrize("tokens", [1, 15, 17, 40])
def test_rows_of_zeros_complete_the_last_block_of_tokens(tokens):
    """A gradient is that of more tokens whose activations and gradients are zero, but for noise."""
    x, w, dy = randn(tokens, 48), randn(64, 48, seed=1), randn(tokens, 64, seed=2)
    q = quantization(NVFP4Config(gradients="nearest"))
    *_, dw = gradients(x, w, dy, q, "auto")
    below = (0, 0, 0, -tokens % 16)
    *_, padded = gradients(F.pad(x, below), w, F.pad(dy, below), q, "auto")
    assert torch.equal(dw, padded)


def test_no_tokens_give_gradients_of_zero():
    x, w, dy = torch.zeros(0, 48), randn(64, 48), torch.zeros(0, 64)
    y, dx, dw = gradients(x, w, dy, quantization(), "auto")
    assert y.shape == (0, 64)
    assert dx.shape == (0, 48)
    assert dw.abs().max() == 0


@pytest.mark.parametrize("config", [NVFP4Config(), NVFP4Config(gradients="ms_eden")], ids=str)
def test_gradients_are_right_on_the_average(config):
    """Over many steps the noise averages out: what remains is what rounding to nearest leaves."""
    x, w, dy = randn(32, 32), randn(32, 32, seed=1), randn(32, 32, seed=2)
    config = dataclasses.replace(config, products=("dgrad",), weights="1d")
    sums = [torch.zeros(32, 32), torch.zeros(32, 32)]
    for step in range(400):
        _, dx, _ = gradients(x, w, dy, quantization(config, step=step), "auto")
        sums[step % 2] += dx / 200
    wanted = dy @ (w if config.gradients == "ms_eden" else fake_quantize(w, "columns"))
    one, two = ((total - wanted).norm() / wanted.norm() for total in sums)
    apart = (sums[0] - sums[1]).norm() / wanted.norm()
    assert max(one, two) < 1.5 * apart
    assert apart < 0.05


def test_noise_is_that_of_step_layer_module_and_token():
    x, w, dy = randn(32, 48), randn(64, 48, seed=1), randn(32, 64, seed=2)
    base = gradients(x, w, dy, quantization(), "auto")
    again = gradients(x, w, dy, quantization(), "auto")
    assert all(torch.equal(a, e) for a, e in zip(again, base, strict=True))
    others = [
        quantization(step=4),
        quantization(first_token=32),
        quantization(module="out_proj"),
        dataclasses.replace(quantization(), layer=8),
        dataclasses.replace(quantization(), seed=6),
    ]
    for other in others:
        y, dx, dw = gradients(x, w, dy, other, "auto")
        assert torch.equal(y, base[0])
        assert not torch.equal(dx, base[1])
        assert not torch.equal(dw, base[2])


def test_a_microbatch_rounds_its_tokens_as_the_batch_does():
    """With the scale of one tensor, halves of a batch have the gradients of the batch."""
    x, w, dy = randn(32, 48), randn(64, 48, seed=1), randn(32, 64, seed=2)
    x[[0, 16], 0], dy[[0, 16], 0] = 50.0, 40.0  # the largest magnitude of both halves
    _, whole, _ = gradients(x, w, dy, quantization(), "auto")
    _, second, _ = gradients(x[16:], w, dy[16:], quantization(first_token=16), "auto")
    assert torch.equal(whole[16:], second)


def test_quantized_weights_are_refused():
    weight = Int8Weight.quantize(torch.randn(32, 32))
    with pytest.raises(OperandError, match="weight is int8, and its product is to be quantized"):
        linear(torch.randn(3, 32), weight, quantization=quantization())


def test_formats_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="MXFP8 and four-over-six are for 1-D blocks"):
        OperandFormat(element="mxfp8", rounding="stochastic")


# Routed experts


def experts_quantization(config=None, **options):
    up = quantization(config, module="experts.up", **options)
    return ExpertsQuantization(up, dataclasses.replace(up, module="experts.down"))


def exact(*shape, seed=0):
    """Numbers whose products add up exactly in any order, with a tensor scale of 1 in NVFP4."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-24, 25, shape, generator=generator).float()
    numbers.view(shape[0], -1)[:, 0] = 2688.0
    return numbers


def mixture(x, indices, weights, up, down, dy, q, backend, activation="relu2"):
    leaves = [t.clone().requires_grad_() for t in (x, weights, up, down)]
    y = routed_experts(
        leaves[0], indices, *leaves[1:], activation=activation, quantization=q, backend=backend
    )
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


def operands(tokens, experts=4, choices=2, width=32, hidden=48, factor=1):
    generator = torch.Generator().manual_seed(9)
    scores = torch.rand(tokens, experts, generator=generator)
    if experts > choices + 1:
        scores[:, 1] *= 0.3  # an expert of few tokens
        scores[:, 2] = 0.0  # an expert of none
    indices = scores.topk(choices).indices
    weights = torch.rand(tokens, choices, generator=generator)
    up = exact(experts, factor * hidden, width, seed=1)
    down = exact(experts, width, hidden, seed=2)
    return exact(tokens, width), indices, weights, up, down, randn(tokens, width, seed=3)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_an_expert_is_a_dense_layer_of_its_tokens(activation, assert_close):
    """One expert for all tokens, in the noise of its own rows."""
    factor = {"relu2": 1, "swiglu": 2}[activation]
    x, _, weights, up, down, dy = operands(21, experts=1, choices=1, factor=factor)
    indices = torch.zeros(21, 1, dtype=torch.long)
    q = experts_quantization()
    found = mixture(x, indices, weights, up, down, dy, q, "torch", activation)
    leaves = [t.clone().requires_grad_() for t in (x, weights, up[0], down[0])]
    h = linear(leaves[0], leaves[2], quantization=q.up)
    a = F.relu(h).square() if activation == "relu2" else F.silu(h[:, :48]) * h[:, 48:]
    y = linear(a * leaves[1], leaves[3], quantization=q.down)
    expected = y.detach(), *torch.autograd.grad(y, leaves, dy)
    for a, e in zip(found, expected, strict=True):
        assert_close(a.view_as(e), e, FLOAT32)


INGREDIENTS = [
    NVFP4Config(),
    NVFP4Config(weights="1d"),
    NVFP4Config(transform="none"),
    NVFP4Config(gradients="nearest"),
    NVFP4Config(weights="1d", scales="four_over_six"),
    NVFP4Config(gradients="ms_eden"),
    NVFP4Config(weights="1d", scales="four_over_six", gradients="ms_eden"),
    *(NVFP4Config(products=(product,)) for product in PRODUCTS),
    *(NVFP4Config(products=(product,), gradients="ms_eden") for product in PRODUCTS[1:]),
]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("config", INGREDIENTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
def test_expert_backends_agree(backend, tokens, config, assert_close):
    """Sums of the first product are exact, so all backends round the same numbers."""
    inputs = operands(tokens)
    q = experts_quantization(config, first_token=100)
    expected = mixture(*inputs, q, "reference")
    for a, e in zip(mixture(*inputs, q, backend), expected, strict=True):
        assert_close(a, e, FLOAT32)


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
def test_experts_of_ms_eden_rotate_groups_of_every_size(activation, assert_close):
    """Experts of 128, 32, 37 (48 with padding), 1 and no tokens."""
    rows = [128, 32, 37, 1, 0]
    indices = torch.arange(5).repeat_interleave(torch.tensor(rows)).unsqueeze(1)
    indices = indices[torch.randperm(len(indices))]
    factor = {"relu2": 1, "swiglu": 2}[activation]
    x, _, weights, *others = operands(len(indices), experts=5, choices=1, factor=factor)
    config = NVFP4Config(weights="1d", scales="four_over_six", gradients="ms_eden")
    q = experts_quantization(config, first_token=7)
    expected, found = (
        mixture(x, indices, weights, *others, q, backend, activation)
        for backend in ("reference", "native")
    )
    for a, e in zip(found, expected, strict=True):
        assert_close(a, e, FLOAT32)


@pytest.mark.parametrize("config", [NVFP4Config(), NVFP4Config(gradients="ms_eden")], ids=str)
def test_experts_of_widths_that_16_does_not_divide_are_not_compiled(config, assert_close):
    inputs = operands(20, width=40, hidden=24)
    found = [mixture(*inputs, experts_quantization(config), b) for b in ("auto", "reference")]
    for a, e in zip(*found, strict=True):
        assert_close(a, e, FLOAT32)


def test_formats_of_which_one_operand_is_rotated_are_not_compiled():
    eden = OperandFormat(rounding="ms_eden")
    formats = NVFP4Config(gradients="ms_eden").formats()
    assert formats.is_compiled
    assert not dataclasses.replace(formats, wgrad=Operands(eden, OperandFormat())).is_compiled
    assert not MXFP8.is_compiled


@needs_compiler
@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("gradients", ["stochastic", "ms_eden"])
def test_threads_change_no_bit_of_compiled_experts(activation, gradients):
    inputs = operands(150, experts=6, factor={"relu2": 1, "swiglu": 2}[activation])
    q = experts_quantization(NVFP4Config(gradients=gradients))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(mixture(*inputs, q, "native", activation))
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_compiler)])
def test_an_expert_without_tokens_has_no_gradient(backend):
    *_, d_up, d_down = mixture(*operands(40), experts_quantization(), backend)
    assert d_up[2].abs().max() == d_down[2].abs().max() == 0
    assert d_up[0].abs().max() > 0
