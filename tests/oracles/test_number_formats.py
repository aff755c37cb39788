"""Our number formats against published quantizers, whose results `number_formats.py` has kept.

Codes and block scales are those of Transformer Engine's reference, bit for bit. Elsewhere they
differ in this, and the tests hold that they differ in nothing else:

* ModelOpt gives blocks of zeros the scale 1, and block scales are at least 2^-9; ours may be 0.
* torchao's block scales are at least 2^-6, and it keeps the sign of a zero.
* Where a block's scale or an element lies in the middle of two numbers, the rounding of the
  operations before decides, and each library has its own order of them.

FP8 is ModelOpt's bit for bit, but for the sign of a zero. MXFP8 is torchao's with scales rounded up
in the same way, but for blocks with the least scale, 2^-127, which torchao does not scale at all.
"""

from functools import cache

import pytest
import torch
from safetensors import safe_open

from nemotron3.ops import fp8, mxfp8
from nemotron3.ops.nvfp4 import SIGNS, quantize, unpack
from nemotron3.ops.nvfp4.hadamard import hadamard
from tests.oracles.number_formats import FILE, SHAPE, inputs

CASES = sorted(inputs())
every_case = pytest.mark.parametrize("name", CASES)
every_block = pytest.mark.parametrize("block", ["1d", "2d"])


@cache
def record():
    with safe_open(FILE, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def kept(key):
    return record()[1][key]


def codes_of(scales):
    return scales.view(torch.uint8).int()


def test_the_file_says_by_what_it_was_made():
    origin = record()[0]
    assert "Transformer Engine" in origin["te"]
    assert origin["modelopt"] == "nvidia-modelopt 0.47.0"
    assert origin["torchao"] == "torchao 0.18.0"


@every_case
def test_the_inputs_are_of_the_kinds_that_they_are_called(name):
    x = kept(f"{name}/x")
    assert x.shape == SHAPE
    assert torch.allclose(x.float(), inputs()[name].float())


@every_case
@every_block
def test_codes_and_scales_are_those_of_transformer_engine(name, block):
    ours = quantize(kept(f"{name}/x"), block)
    assert torch.equal(ours.codes, kept(f"{name}/te/{block}/codes"))
    assert torch.equal(codes_of(ours.row_scales), codes_of(kept(f"{name}/te/{block}/scales")))


@every_case
def test_four_over_six_is_that_of_transformer_engine(name):
    x = kept(f"{name}/x")
    ours = quantize(x, scales="four_over_six")
    assert torch.equal(ours.codes, kept(f"{name}/te/four over six/codes"))
    theirs = codes_of(kept(f"{name}/te/four over six/scales"))
    assert torch.equal(codes_of(ours.block_scales), theirs)


@every_case
def test_the_transform_is_that_of_transformer_engine(name):
    x = kept(f"{name}/x")
    ours = hadamard(x.float(), torch.tensor(SIGNS))
    theirs = kept(f"{name}/te/hadamard").float()
    tolerance = 2**-8 if x.dtype == torch.bfloat16 else 1e-6
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    transformed = quantize(kept(f"{name}/te/hadamard"))
    assert torch.equal(transformed.codes, kept(f"{name}/te/hadamard 1d/codes"))


def undecided_blocks(x):
    """Whose scale lies in the middle of two E4M3 numbers but for rounding errors."""
    wanted = x.double().abs().unflatten(-1, (-1, 16)).amax(-1) * 448 / x.double().abs().max()
    step = torch.exp2(torch.floor(torch.log2(wanted.clamp(min=2**-6))) - 3)
    return ((wanted / step) % 1 - 0.5).abs() < 1e-4


def undecided_elements(x, ours):
    """Which lie in the middle of two E2M1 numbers but for rounding errors."""
    scales = ours.block_scales.double().repeat_interleave(16, -1)
    scaled = x.double().abs() / (scales * x.double().abs().max() / 2688)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    return (scaled.unsqueeze(-1) - middles).abs().amin(-1) < 1e-4


@every_case
@pytest.mark.parametrize(("library", "least"), [("modelopt", 2.0**-9), ("torchao", 2.0**-6)])
def test_published_checkpoints_differ_where_they_are_said_to(name, library, least):
    x = kept(f"{name}/x")
    ours = quantize(x)
    assert ours.tensor_scale == kept(f"{name}/{library}/scale")
    theirs = kept(f"{name}/{library}/scales")
    may_differ = undecided_blocks(x) | (ours.block_scales.float() < least)
    differ = codes_of(ours.block_scales) != codes_of(theirs)
    assert not (differ & ~may_differ).any()
    codes = unpack(ours.codes) != unpack(kept(f"{name}/{library}/codes"))
    may_differ = may_differ.repeat_interleave(16, -1) | undecided_elements(x, ours)
    assert not (codes & ~may_differ & (x != 0)).any()
    if name in ("ordinary", "bfloat16", "heavy", "tiny"):
        assert not differ.any()
        assert not (codes & (x != 0)).any()


@every_case
def test_values_are_those_of_modelopt(name):
    values = kept(f"{name}/modelopt/values")
    ours = quantize(kept(f"{name}/x"))
    same = codes_of(ours.block_scales) == codes_of(kept(f"{name}/modelopt/scales"))
    same = same.repeat_interleave(16, -1) & (ours.elements() != 0)
    same &= unpack(ours.codes) == unpack(kept(f"{name}/modelopt/codes"))
    assert same.any()
    difference = (ours.dequantize() - values)[same].abs()
    assert (difference <= 2.5e-7 * values[same].abs()).all()


@every_case
def test_fp8_is_that_of_modelopt(name):
    x = kept(f"{name}/x")
    ours, theirs = fp8.quantize(x), kept(f"{name}/modelopt fp8/codes")
    assert ours.scale == kept(f"{name}/modelopt fp8/scale")
    assert torch.equal(ours.codes.float(), theirs.float())
    assert torch.equal(codes_of(ours.codes)[x != 0], codes_of(theirs)[x != 0])


@every_case
@pytest.mark.parametrize(("element", "kept_as"), [("e4m3", "e4m3fn"), ("e5m2", "e5m2")])
def test_mxfp8_is_that_of_torchao(name, element, kept_as):
    x = kept(f"{name}/x")
    ours = mxfp8.quantize(x, element)
    theirs = {part: kept(f"{name}/torchao mx {kept_as}/{part}") for part in ("codes", "scales")}
    assert torch.equal(codes_of(ours.block_scales), codes_of(theirs["scales"]))
    is_scaled = (codes_of(ours.block_scales) > 0).repeat_interleave(32, -1)
    assert torch.equal(ours.codes.float()[is_scaled], theirs["codes"].float()[is_scaled])
    assert is_scaled.any()
