"""NVFP4: every input has the result that is written down, on every backend."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.minifloat import E2M1, E4M3, decode
from nemotron3.ops.nvfp4 import (
    BLOCK,
    SIGNS,
    NVFP4Tensor,
    fake_quantize,
    hadamard,
    pack,
    quantize,
    unpack,
)
from nemotron3.ops.rounding import Noise
from tests.ops.native import needs_compiler

BACKENDS = ["reference", *(["native"] if native.available() else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_block = pytest.mark.parametrize("block", ["1d", "2d"])
NOISE = Noise(seed=1, step=2, layer=3, role="gradient")
LARGEST = 3.4028234663852886e38


def stochastic(x, noise=NOISE, **options):
    return quantize(x, rounding="stochastic", noise=noise, **options)


def same_bits(one, other):
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.block_scales.view(torch.uint8), other.block_scales.view(torch.uint8))
    assert torch.equal(one.tensor_scale.nan_to_num(7), other.tensor_scale.nan_to_num(7))


# An independent statement of the arithmetic: one block at a time, with NumPy's float32 scalars and
# a search through all numbers of a format instead of arithmetic on exponents.


@cache
def numbers(of):
    every = decode(torch.arange(of.sign, dtype=torch.uint8), of).numpy()
    return every[~np.isnan(every)].astype(np.float64)


def nearest_code(value, of):
    distances = np.abs(numbers(of) - min(abs(float(value)), of.largest))
    best = np.flatnonzero(distances == distances.min())
    return int(next((b for b in best if b % 2 == 0), best[0]))


def quantized_block(block, amax):
    """Codes of the elements, the scale's code, and the tensor scale."""
    f = np.float32
    largest = f(LARGEST)
    with np.errstate(all="ignore"):
        encode = min(f(2688) / amax, largest) if amax > 0 else f(1)
        own = np.abs(block).max()
        scale = nearest_code(own * (encode * (f(1) / f(6))), E4M3)
        factor = min(f(1) / (f(numbers(E4M3)[scale]) * (f(1) / encode)), largest)
        scaled = [f(x) * factor for x in block]
    codes = [nearest_code(s, E2M1) + (8 if s < 0 else 0) for s in scaled]
    tensor_scale = max(amax / f(2688), f(2.0**-128)) if amax > 0 else f(0)
    return codes, scale, tensor_scale


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
values = st.one_of(
    finite, st.floats(-8, 8, width=32), st.sampled_from([0.0, -0.0, 1e-45, -1e-40, LARGEST])
)


@every_backend
@settings(max_examples=150)
@given(st.lists(values, min_size=32, max_size=32), st.booleans())
def test_any_finite_numbers(backend, drawn, is_bfloat16):
    x = torch.tensor(drawn, dtype=torch.float32).view(2, 16)
    if is_bfloat16:
        x = x.clamp(-3e38, 3e38).bfloat16()
    found = quantize(x, backend=backend)
    wide = x.float().numpy()
    for row in range(2):
        codes, scale, tensor_scale = quantized_block(wide[row], np.abs(wide).max())
        assert unpack(found.codes)[row].tolist() == codes
        assert found.block_scales[row].view(torch.uint8).item() == scale
        assert found.tensor_scale.item() == tensor_scale
    back = found.dequantize()
    assert back.isfinite().all()
    error = (back.double() - x.double()).abs()
    own = x.double().abs().amax(-1, keepdim=True)
    floor = x.double().abs().max() * 2.0**-10 / 448  # below it a block is zeros
    assert (error <= own * 0.18 + floor + 2e-38).all()


@every_backend
def test_every_finite_bfloat16_number(backend):
    """Sixteen neighbours at a time, each a tensor of its own."""
    every = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite()].view(-1, 1, 16)
    found = quantize(x, batch_dims=1, backend=backend)
    error = (found.dequantize().double() - x.double()).abs()
    assert (error <= x.double().abs().amax(-1, keepdim=True) * 0.18 + 2e-38).all()
    largest = found.dequantize().abs().amax(-1)
    assert (largest[x.float().abs().amax(-1) > 2e-38] > 0).all()


@every_backend
@every_block
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zeros(backend, block, rounding):
    for zeros in (torch.zeros(16, 32), -torch.zeros(16, 32)):
        noise = NOISE if rounding == "stochastic" else None
        found = quantize(zeros, block, rounding, noise=noise, backend=backend)
        assert not found.codes.any()
        assert not found.block_scales.float().any()
        assert found.tensor_scale == 0
        assert torch.equal(found.dequantize(), torch.zeros(16, 32))


@every_backend
@every_block
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_what_is_not_finite_spoils_its_block_and_nothing_else(backend, block, value, rounding):
    x = torch.randn(32, 48)
    noise = NOISE if rounding == "stochastic" else None
    spoilt = x.clone()
    spoilt[17, 20] = value
    rows, columns = (slice(17, 18), slice(16, 32)) if block == "1d" else (slice(16, 32),) * 2
    with_zeros = x.clone()
    with_zeros[rows, columns] = 0.0
    amax = torch.where(spoilt.isfinite(), spoilt, 0.0).abs().max()
    found = quantize(spoilt, block, rounding, noise=noise, backend=backend)
    expected = quantize(with_zeros, block, rounding, noise=noise, amax=amax, backend=backend)
    assert found.tensor_scale == expected.tensor_scale
    back, others = found.dequantize(), expected.dequantize()
    assert back[rows, columns].isnan().all()
    back[rows, columns] = 0.0
    assert torch.equal(back, others)
    everything = torch.full((16, 16), value)
    assert quantize(everything, block, backend=backend).dequantize().isnan().all()


@every_backend
def test_subnormal_scales_and_scales_of_zero(backend):
    """A block at 2^-9 / 448 of the largest value keeps its values, one at 2^-11 is zeros."""
    x = torch.zeros(4, 16)
    x[0, 0] = 6.0 * 448
    for row, size in ((1, 2.0**-6), (2, 2.0**-9), (3, 2.0**-11)):
        x[row] = torch.tensor([6.0, -3.0, 0.5, 0.0] * 4) * size
    found = quantize(x, backend=backend)
    assert found.block_scales.flatten().tolist() == [448, 2.0**-6, 2.0**-9, 0]
    back = found.dequantize()
    assert torch.equal(back[:3], x[:3])
    assert not back[3].any()
    assert stochastic(x, backend=backend).dequantize()[3].any()


@every_backend
@every_block
def test_the_largest_and_the_smallest_magnitudes(backend, block):
    x = torch.randn(32, 64).clamp(-3, 3)
    for size in (LARGEST / 3, 1e30, 1e-30, 1e-36, 1e-37):
        back = quantize(x * size, block, backend=backend).dequantize()
        assert (back - x * size).double().square().sum() < 0.02 * (x * size).double().square().sum()
    for size in (1e-40, 1e-45):
        back = quantize(x * size, block, backend=backend).dequantize()
        assert (back.abs() <= 1.2 * (x * size).abs().max()).all()


@every_backend
def test_two_dimensional_blocks_are_those_of_the_transposed_matrix(backend):
    x = torch.randn(48, 80)
    one, other = (quantize(t, "2d", backend=backend).dequantize() for t in (x, x.T))
    assert torch.equal(one, other.T)
    rows = quantize(x, backend=backend).dequantize()
    assert not torch.equal(rows, one)


@every_backend
@every_block
def test_each_matrix_of_a_batch_is_quantized_alone(backend, block):
    x = torch.randn(3, 32, 48) * torch.tensor([1.0, 100.0, 0.0]).view(3, 1, 1)
    found = quantize(x, block, batch_dims=1, backend=backend)
    assert found.tensor_scale.shape == (3,)
    assert found.shape == x.shape
    alone = [quantize(matrix, block, backend=backend).dequantize() for matrix in x]
    assert torch.equal(found.dequantize(), torch.stack(alone))
    together = quantize(x, block, backend=backend)
    assert together.tensor_scale.shape == ()
    assert not torch.equal(together.dequantize()[0], alone[0])


@every_backend
def test_a_given_amax_scales_and_clips(backend):
    x = torch.randn(16, 64)
    whole = quantize(x, backend=backend)
    halves = [quantize(part, amax=x.abs().max(), backend=backend) for part in x.split(8)]
    assert torch.equal(whole.codes, torch.cat([half.codes for half in halves]))
    back = quantize(x, amax=torch.tensor(0.5), backend=backend).dequantize()
    assert back.abs().max() == 0.5


@every_backend
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((16,), "1d"),
        ((0, 16), "1d"),
        ((0, 32, 16), "2d"),
        ((2, 3, 5, 16), "1d"),
        ((2, 0, 16), "2d"),
    ],
)
def test_awkward_shapes(backend, shape, block):
    x = torch.randn(shape)
    found = quantize(x, block, backend=backend)
    assert found.shape == shape
    assert found.dequantize().shape == shape
    apart = torch.stack([x, x], -1)[..., 0]
    same_bits(quantize(apart, block, backend=backend), found)
    assert stochastic(x, block=block, backend=backend).shape == shape


def test_two_elements_in_a_byte():
    codes = torch.arange(16, dtype=torch.uint8)
    packed = pack(codes)
    assert packed.tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack(packed), codes)
    x = torch.tensor([6.0, -0.5] + [0.0] * 14)
    assert quantize(x).codes[0] == 0x97


def test_four_and_a_half_bits_an_element():
    found = quantize(torch.randn(128, 256))
    assert isinstance(found, NVFP4Tensor)
    assert found.nbytes == 128 * 256 * 4.5 / 8 + 4
    assert found.codes.shape == (128, 128)
    assert found.block_scales.shape == (128, 16)
    assert found.dequantize(torch.bfloat16).dtype == torch.bfloat16


DRAWS = 4096


@every_backend
@every_block
@pytest.mark.parametrize("kind", ["normal", "heavy", "small blocks"])
def test_stochastic_rounding_is_right_on_the_average(backend, block, kind):
    """Within five standard deviations, for each element; a clipped one would be off by thirty."""
    rows, columns = (1, 96) if block == "1d" else (16, 32)
    x = torch.randn(rows, columns)
    if kind == "heavy":
        x = x / torch.rand(rows, columns)
    if kind == "small blocks":
        x = x * torch.exp2(torch.arange(columns) // 16 * (-4.0 if block == "1d" else -20.0))
    found = stochastic(x.repeat(DRAWS, 1), block=block, backend=backend)
    scales = found.row_scales[:rows].double().repeat_interleave(BLOCK, -1)
    in_steps = scales * found.tensor_scale.double()
    mean = found.elements().double().unflatten(0, (DRAWS, rows)).mean(0)
    wanted = x.double() / in_steps
    step = torch.where(wanted.abs() < 2, 0.5, torch.where(wanted.abs() < 4, 1.0, 2.0))
    sigmas = (mean - wanted) / (0.5 * step / math.sqrt(DRAWS))
    assert sigmas.abs().max() < 5
    assert sigmas.mean().abs() < 5 / math.sqrt(x.numel())
    assert wanted.abs().max() <= 6.00001


@every_backend
def test_stochastic_rounding_goes_to_the_neighbours_and_keeps_what_is_exact(backend):
    x = torch.randn(16, 64)
    found = stochastic(x.repeat(50, 1), backend=backend)
    magnitudes = (unpack(found.codes) & 7).int().unflatten(0, (50, 16))
    apart = magnitudes.amax(0) - magnitudes.amin(0)
    assert apart.max() == 1
    assert apart.float().mean() > 0.9
    exact = torch.tensor([6.0, -4.0, 3.0, 2.0, -1.5, 1.0, 0.5, 0.0] * 8)
    kept = stochastic(exact.repeat(64, 1), backend=backend)
    assert torch.equal(kept.elements(), exact.expand(64, -1))
    assert (kept.block_scales.float() == 448).all()


@every_backend
@every_block
def test_no_block_becomes_zeros(backend, block):
    """Nearest rounding gives up small blocks, of which gradients of a large tensor have many."""
    x = torch.randn(64, 64) * torch.exp2(torch.arange(64) // 16 * -6.5).unsqueeze(1)
    assert (quantize(x, block, backend=backend).dequantize()[48:] == 0).float().mean() > 0.9
    back = stochastic(x, block=block, backend=backend).dequantize()
    assert back.unflatten(1, (4, 16)).ne(0).any(-1).all()


@every_backend
def test_noise_is_a_function_of_seed_step_layer_role_and_place(backend):
    x = torch.randn(32, 256)
    first = stochastic(x, backend=backend)
    same_bits(first, stochastic(x, Noise(1, 2, 3, "gradient"), backend=backend))
    for other in (Noise(2, 2, 3, "gradient"), Noise(1, 3, 3, "gradient"),
                  Noise(1, 2, 4, "gradient"), Noise(1, 2, 3, "other")):  # fmt: skip
        changed = unpack(stochastic(x, other, backend=backend).codes) != unpack(first.codes)
        assert 0.2 < changed.float().mean() < 0.6
    torch.manual_seed(99)
    same_bits(first, stochastic(x, backend=backend))


@every_backend
@given(
    rows=st.permutations(range(6)),
    first=st.integers(0, 11),
    width=st.integers(1, 12),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_a_part_in_any_order_is_rounded_as_in_the_whole(backend, rows, first, width, dtype):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(6, 12 * BLOCK, generator=generator)
    columns = slice(first * BLOCK, min(first + width, 12) * BLOCK)
    whole = unpack(stochastic(x, backend=backend).codes)
    part = Noise(1, 2, 3, "gradient", torch.tensor(rows[:4], dtype=dtype), first * BLOCK)
    found = stochastic(x[rows[:4], columns], part, amax=x.abs().max(), backend=backend)
    assert torch.equal(unpack(found.codes), whole[rows[:4], columns])


KINDS = {"rows": "1d", "tiles": "2d"}
signs = torch.tensor(SIGNS, dtype=torch.float32)
every_rounding = pytest.mark.parametrize("noise", [None, NOISE], ids=["nearest", "stochastic"])


def rounding_of(noise):
    return {"rounding": "nearest" if noise is None else "stochastic", "noise": noise}


@every_backend
@pytest.mark.parametrize("kind", KINDS)
@every_rounding
def test_fake_quantization_gives_the_values_of_the_quantized_tensor(backend, kind, noise):
    x = awkward_tensor((2, 48, 288))
    given = {**rounding_of(noise), "batch_dims": 1, "backend": backend}
    expected = quantize(x, KINDS[kind], **given).dequantize()
    found = fake_quantize(x, kind, **given)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_are_the_rows_of_the_transposed_matrix(backend, dtype):
    x = torch.randn(48, 80).to(dtype)
    found = fake_quantize(x, "columns", backend=backend)
    assert torch.equal(found, quantize(x.T).dequantize().T)
    transformed = hadamard(x.T.float(), signs).to(dtype)
    found = fake_quantize(x, "columns", signs=signs, backend=backend)
    assert torch.equal(found, quantize(transformed).dequantize().T)
    low = fake_quantize(x, "columns", signs=signs, amax=torch.tensor(0.1), backend=backend)
    assert low.abs().max() <= 0.1001


@every_backend
def test_the_noise_of_columns_is_of_the_elements_own_place(backend):
    x = torch.randn(32, 64)
    whole = fake_quantize(x, "columns", "stochastic", noise=NOISE, backend=backend)
    part = Noise(1, 2, 3, "gradient", torch.arange(16, 32), 32)
    found = fake_quantize(
        x[16:, 32:], "columns", "stochastic", noise=part, amax=x.abs().max(), backend=backend
    )
    assert torch.equal(found, whole[16:, 32:])


def test_the_transform_spreads_and_keeps_products():
    x, y = torch.randn(5, 64, dtype=torch.float64), torch.randn(7, 64, dtype=torch.float64)
    s = signs.double()
    assert torch.allclose(hadamard(x, s) @ hadamard(y, s).T, x @ y.T)
    one = torch.zeros(16)
    one[3] = 8.0
    assert (hadamard(one, signs).abs() == 2.0).all()
    matrix = hadamard(torch.eye(16), torch.ones(16))
    assert torch.allclose(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(16))


def awkward_tensor(shape):
    """Small blocks, zeros, numbers that are none, subnormal and very large ones."""
    x = torch.randn(shape) * torch.exp2(torch.randint(-24, 3, shape[:-1]).float()).unsqueeze(-1)
    x[..., 1, :16] = 0.0
    x[..., 2, 5] = -0.0
    x[..., 3, -1] = torch.nan
    x[..., 4, 9] = torch.inf
    x[..., 5, :16] = 1e-42
    return x


@needs_compiler
@settings(max_examples=60)
@given(
    shape=st.sampled_from([(1, 16, 16), (3, 16, 48), (1, 32, 272), (2, 48, 288), (1, 64, 512)]),
    kind=st.sampled_from(["rows", "tiles", "columns"]),
    noise=st.one_of(
        st.none(), st.builds(Noise, *[st.integers(0, 9)] * 3, st.just("x"), st.none(),
                             st.sampled_from([0, 16, 112, 1280]))
    ),
    transformed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([1.0, 1e-30, 1e-37, 1e-40, 1e30]),
    drawn=st.integers(0, 1000),
)  # fmt: skip
def test_native_has_the_bits_of_the_reference(shape, kind, noise, transformed, dtype, size, drawn):
    torch.manual_seed(drawn)
    torch.set_num_threads(1 + drawn % 3)
    x = (torch.randn(shape) if drawn % 3 else awkward_tensor(shape)).mul(size).to(dtype)
    for batch_dims in (0, 1):
        given = {**rounding_of(noise), "batch_dims": batch_dims}
        if kind == "columns" and transformed:
            given["signs"] = signs
        one, other = (fake_quantize(x, kind, **given, backend=b) for b in ("reference", "native"))
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        if kind in KINDS:
            same_bits(*(quantize(x, KINDS[kind], **given, backend=b) for b in BACKENDS))


def test_mistakes_are_named():
    x = torch.randn(32, 40)
    with pytest.raises(OperandError, match="40 d of x are not divisible by 16; pad"):
        quantize(x)
    with pytest.raises(OperandError, match="20 rows of x are not divisible by 16"):
        quantize(torch.randn(20, 32), "2d")
    with pytest.raises(OperandError, match=r"dtype torch.float64; .*x.float\(\)"):
        quantize(torch.randn(16).double())
    with pytest.raises(OperandError, match=r"dtype torch.int64"):
        quantize(torch.zeros(16, dtype=torch.int64))
    with pytest.raises(OperandError, match=r"shape \[\]"):
        quantize(torch.tensor(1.0))
    with pytest.raises(OperandError, match=r"shape \[16\]; expected 0 batch axes"):
        quantize(torch.randn(16), "2d")
    with pytest.raises(OperandError, match=r"shape \[16\]; expected 1 batch axes"):
        quantize(torch.randn(16), batch_dims=1)
    with pytest.raises(OperandError, match="there are 0 of d"):
        quantize(torch.randn(3, 0))
    with pytest.raises(OperandError, match="has no gradients"):
        quantize(torch.randn(16, requires_grad=True))
    with pytest.raises(ValueError, match="block is '3d'; choose from 1d, 2d"):
        quantize(torch.randn(16), "3d")
    with pytest.raises(ValueError, match="rounding is 'up'; choose from nearest, stochastic"):
        quantize(torch.randn(16), rounding="up")
    with pytest.raises(ValueError, match="pass noise=Noise"):
        quantize(torch.randn(16), rounding="stochastic")
    with pytest.raises(ValueError, match="leave noise out"):
        quantize(torch.randn(16), noise=NOISE)
    with pytest.raises(OperandError, match=r"rows of noise has shape \[3\]; expected \[2\]"):
        stochastic(torch.randn(2, 16), Noise(0, 0, 0, "x", torch.arange(3)))
    with pytest.raises(ValueError, match="first_column of noise is 8"):
        stochastic(torch.randn(2, 16), Noise(0, 0, 0, "x", first_column=8))
    with pytest.raises(ValueError, match="kind is '1d'; choose from rows, tiles, columns"):
        fake_quantize(torch.randn(16), "1d")
    with pytest.raises(ValueError, match="signs are given and kind is 'rows'"):
        fake_quantize(torch.randn(16), signs=signs)
    with pytest.raises(OperandError, match=r"signs has shape \[8\]; expected \[16\]"):
        fake_quantize(torch.randn(16, 16), "columns", signs=signs[:8])
    with pytest.raises(OperandError, match="20 rows of x are not divisible"):
        fake_quantize(torch.randn(20, 32), "columns")
    with pytest.raises(OperandError, match=r"amax has shape \[2\]; expected \[\]"):
        quantize(torch.randn(2, 16), amax=torch.ones(2))
