"""Products in NVFP4 by PyTorch's scaled product, which is emulated here from its operands.

PyTorch itself checks shapes, dtypes and layouts, on the meta device. The layout of scales is that
of cuBLAS's documentation.
"""

import pytest
import torch
from torch.nn import functional as F

from nemotron3.models.nvfp4_recipe import NVFP4Config
from nemotron3.ops.experts import routed_experts
from nemotron3.ops.linear import linear
from nemotron3.ops.low_precision import scaled
from nemotron3.ops.minifloat import E2M1, decode
from nemotron3.ops.nvfp4 import unpack
from tests.ops.test_low_precision import experts_quantization, quantization, randn

pytestmark = pytest.mark.skipif(
    not hasattr(F, "scaled_mm"), reason="this version of PyTorch has no scaled product"
)
NEAREST = NVFP4Config(gradients="nearest")


def operand(codes, scales, rows, blocks):
    """The values of an operand, its scales read where cuBLAS reads them."""
    row, block = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tiles = -(-blocks // 4)
    offset = (row // 128 * tiles + block // 4) * 512
    offset = offset + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    elements = decode(unpack(codes.view(torch.uint8)), E2M1)
    own = scales[0].view(torch.uint8)[offset].view(torch.float8_e4m3fn).float()
    return elements * own.repeat_interleave(16, 1) * scales[1]


@pytest.fixture
def calls(monkeypatch):
    """Let products run scaled; the list of their shapes."""
    real, shapes = F.scaled_mm, []

    def emulated(a, b, scale_a, recipe_a, scale_b, recipe_b, **options):
        like = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in (a, b)]
        scales = [[s.to("meta") for s in pair] for pair in (scale_a, scale_b)]
        checked = real(like[0], like[1], scales[0], recipe_a, scales[1], recipe_b, **options)
        (m, half), n = a.shape, b.shape[1]
        y = operand(a, scale_a, m, half // 8) @ operand(b.T, scale_b, n, half // 8).T
        assert y.shape == checked.shape
        shapes.append((m, 2 * half, n))
        return y.to(checked.dtype)

    monkeypatch.setattr(F, "scaled_mm", emulated)
    monkeypatch.setattr(scaled, "is_available", lambda _: True)
    return shapes


def close(found, expected):
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == e.dtype
        assert (a.float() - e.float()).norm() / e.float().norm() < 0.01


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(64, 96, 128), (37, 48, 40), (200, 32, 8)]
)
def test_a_dense_product_and_its_gradients(calls, monkeypatch, tokens, inputs, outputs):
    x, w = randn(tokens, inputs).bfloat16(), randn(outputs, inputs, seed=1).bfloat16()
    dy = randn(tokens, outputs, seed=2).bfloat16()

    def results():
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = linear(*leaves, quantization=quantization(NEAREST), backend="torch")
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    found = results()
    assert len(calls) == 3
    monkeypatch.setattr(scaled, "is_available", lambda _: False)
    close(found, results())
    assert len(calls) == 3


def test_gradients_are_rounded_stochastically(calls):
    x, w, dy = (randn(64, 64, seed=seed).bfloat16() for seed in range(3))

    def gradients(step):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        y = linear(*leaves, quantization=quantization(step=step), backend="torch")
        return torch.autograd.grad(y, leaves, dy)

    one, again, other = gradients(1), gradients(1), gradients(2)
    for a, b, c in zip(one, again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert len(calls) == 9


def test_experts(calls, monkeypatch):
    x, up = randn(50, 32), randn(3 * 48, 32, seed=1).view(3, 48, 32)
    down = randn(3 * 32, 48, seed=2).view(3, 32, 48)
    operands = [t.bfloat16() for t in (x, up, down)]
    indices = torch.arange(100).view(50, 2) % 3
    q = experts_quantization(NEAREST)

    def result():
        x, up, down = operands
        weights = torch.ones(50, 2)
        return routed_experts(
            x, indices, weights, up, down, activation="relu2", quantization=q, backend="torch"
        )

    found = result()
    assert len(calls) == 6
    monkeypatch.setattr(scaled, "is_available", lambda _: False)
    expected = result()
    assert (found - expected).float().norm() / expected.float().norm() < 0.1


def test_other_dtypes_and_formats_are_emulated(calls):
    x, w = randn(32, 64), randn(48, 64)
    linear(x, w, quantization=quantization(), backend="torch")
    eden = quantization(NVFP4Config(gradients="ms_eden"))
    linear(x.bfloat16(), w.bfloat16(), quantization=eden, backend="torch")
    assert not calls


def test_no_device_here_has_such_products():
    assert not scaled.is_available(torch.device("cpu"))
