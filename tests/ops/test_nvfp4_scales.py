"""Block scales that are chosen by the error of what is rounded."""

import pytest
import torch

from nemotron3.ops.nvfp4 import quantize


def errors(matrix, scales):
    held = quantize(matrix, scales=scales).dequantize()
    return (held - matrix).double().unflatten(-1, (-1, 16)).square().sum(-1)


@pytest.mark.parametrize("kind", ["normal", "heavy", "rows", "sparse", "tiny", "zeros"])
def test_no_block_is_worse_than_with_plain_scales(kind):
    matrix = torch.randn(64, 256)
    if kind == "heavy":
        matrix = matrix / torch.rand(64, 256)
    if kind == "rows":
        matrix = matrix * torch.logspace(-3, 3, 64).unsqueeze(-1)
    if kind == "sparse":
        matrix = matrix * (torch.rand(64, 256) < 0.05)
    if kind == "tiny":
        matrix = matrix * 1e-30
    if kind == "zeros":
        matrix = torch.zeros(64, 256)
    plain, best = errors(matrix, "max"), errors(matrix, "mse")
    assert (best <= plain * (1 + 1e-5) + 1e-80).all()
    if kind in ("normal", "rows"):
        assert best.sum() < 0.85 * plain.sum()
        assert best.sum() < errors(matrix, "four_over_six").sum()


def test_the_scale_is_the_best_of_all():
    """Every E4M3 scale is tried, for one block beside one that fixes the tensor scale."""
    torch.manual_seed(3)
    matrix = torch.cat([torch.full((1, 16), 20.0), torch.randn(1, 16)], -1)
    found = quantize(matrix, scales="mse")
    units = torch.arange(1, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    units = units.view(-1, 1) * found.tensor_scale
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    grid = torch.cat([-grid, grid])
    tried = matrix[:, 16:] / units
    off = ((tried.unsqueeze(-1) - grid).abs().amin(-1) * units).square().sum(-1)
    assert errors(matrix, "mse")[0, 1].item() == pytest.approx(off.min().item(), rel=1e-4)


def test_what_is_not_finite_spoils_its_block_only():
    matrix = torch.randn(2, 48)
    expected = quantize(matrix, scales="mse").dequantize()
    matrix[0, 20] = torch.inf
    matrix[1, 3] = torch.nan
    found = quantize(matrix, scales="mse", amax=matrix.nan_to_num(0, 0).abs().max()).dequantize()
    assert found[0, 16:32].isnan().all()
    assert found[1, :16].isnan().all()
    assert torch.equal(found[0, 32:], quantize(matrix[:1, 32:], scales="mse",
                       amax=matrix.nan_to_num(0, 0).abs().max()).dequantize()[0])  # fmt: skip
    assert not expected.isnan().any()
