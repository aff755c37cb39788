"""The entry point of NVFP4 quantization: checks, and the choice of a backend.

What comes out for what goes in:

* A finite value is off by half a step of E2M1 times the block's scale at most, to nearest. The
  largest of a block may be off by 1/16, where its scale was rounded down.
* Zeros of both signs have the code 0. A block of zeros has the scale 0, and a tensor of zeros the
  tensor scale 0.
* A block that is smaller than the tensor by 2^-10 / 448 is zeros to nearest. Stochastically it is
  right on the average, as everything is.
* A tensor whose largest magnitude is below 8e-36 is as good as any other down to about 2e-38;
  smaller values, subnormal ones among them, shrink towards zero.
* NaN and infinities make their whole block NaN, and change nothing else.
"""

from typing import Literal, get_args

from jaxtyping import Float, Float32
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_operand, check_quantizable
from nemotron3.ops.nvfp4.four_over_six import fake_four_over_six, four_over_six
from nemotron3.ops.nvfp4.mse import mse
from nemotron3.ops.nvfp4.native import (
    fake_four_over_six_native,
    fake_quantize_native,
    four_over_six_native,
    mse_native,
    quantize_native,
)
from nemotron3.ops.nvfp4.reference import (
    Kind,
    Transform,
    fake_quantize_reference,
    quantize_reference,
)
from nemotron3.ops.nvfp4.tensor import BLOCK, Block, NVFP4Tensor
from nemotron3.ops.rounding.noise import Noise, Rounding, placed

Scales = Literal["max", "mse", "four_over_six"]
"""How block scales are chosen: from the largest magnitude, or by the error of what is rounded."""
_QUANTIZE = {
    "reference": quantize_reference,
    "torch": quantize_reference,
    "native": quantize_native,
    "triton": Kernel("nemotron3.ops.nvfp4.triton", "quantize_triton"),
}
_FAKE_QUANTIZE = {
    "reference": fake_quantize_reference,
    "torch": fake_quantize_reference,
    "native": fake_quantize_native,
    "triton": Kernel("nemotron3.ops.nvfp4.triton", "fake_quantize_triton"),
}
_BY_ERROR = {
    "four_over_six": {
        "reference": four_over_six,
        "torch": four_over_six,
        "native": four_over_six_native,
    },
    "mse": {"reference": mse, "torch": mse, "native": mse_native},
}
_FAKE_FOUR_OVER_SIX = {
    "reference": fake_four_over_six,
    "torch": fake_four_over_six,
    "native": fake_four_over_six_native,
}
_TILE_ROWS = {"1d": 1, "2d": BLOCK}


def quantize(
    x: Float[Tensor, "*axes d"],
    block: Block = "1d",
    rounding: Rounding = "nearest",
    *,
    noise: Noise | None = None,
    scales: Scales = "max",
    amax: Float32[Tensor, "*batch"] | None = None,
    batch_dims: int = 0,
    backend: Backend = "auto",
) -> NVFP4Tensor:
    """Quantize a float32 or bfloat16 tensor.

    `block` is "1d" for 16 elements along the last axis, or "2d" for squares over the last two.
    Stochastic rounding needs `noise`. `amax` is the largest magnitude, where it is not that of `x`
    alone: of all shards of a tensor, or from calibration; larger values are clipped. `scales` is
    "max", "mse" (mse.py) or "four_over_six" (four_over_six.py), the last two for 1-D blocks to
    nearest. With
    `batch_dims` of 1 the first axis counts tensors (experts), which have a tensor scale each.

    Raises OperandError for another dtype, an axis that is not divisible by 16, and operands that
    require gradients: the codes have none.
    """
    if block not in _TILE_ROWS:
        raise ValueError(f"nvfp4: block is {block!r}; choose from {', '.join(_TILE_ROWS)}")
    _check_scales(scales, block, rounding)
    check_quantizable("nvfp4", x, ("d",) if block == "1d" else ("rows", "d"), BLOCK, batch_dims)
    places = placed("nvfp4", rounding, noise, x)
    wide, amax = _flat(x, amax, batch_dims)
    if scales == "max":
        quantizer = resolve("nvfp4", backend, _QUANTIZE, wide)
        parts = quantizer(wide, amax, _TILE_ROWS[block], places)
    else:
        parts = resolve(f"nvfp4 {scales}", backend, _BY_ERROR[scales], wide)(wide.float(), amax)
    lead = x.shape[:-1] if block == "1d" else (*x.shape[:-2], x.shape[-2] // BLOCK)
    return NVFP4Tensor(
        codes=parts.codes.view(*x.shape[:-1], x.shape[-1] // 2),
        block_scales=parts.block_scales.view(*lead, x.shape[-1] // BLOCK),
        tensor_scale=parts.tensor_scale.view(x.shape[:batch_dims]),
        block=block,
    )


def fake_quantize(  # noqa: PLR0913 - what is rounded, and how
    x: Float[Tensor, "*axes rows d"],
    kind: Kind = "rows",
    rounding: Rounding = "nearest",
    *,
    noise: Noise | None = None,
    scales: Literal["max", "four_over_six"] = "max",
    amax: Float32[Tensor, "*batch"] | None = None,
    signs: Float32[Tensor, " 16"] | None = None,
    batch_dims: int = 0,
    backend: Backend = "auto",
) -> Float32[Tensor, "*axes rows d"]:
    """The values that `quantize` would keep, in float32 and without packing them first.

    `kind` says which elements share a scale: 16 in a row ("rows", block "1d" of `quantize`), 16 x
    16 ("tiles", "2d"), or 16 in a column ("columns"): the transposed matrix in 1-D blocks, as the
    product for a weight's gradient takes it, with the noise of the element's own place. With
    `signs` the columns get a random Hadamard transform first (`hadamard`), whose result is rounded
    to the dtype of `x` and is what is quantized; `amax` is then the transform's. `scales` of
    "four_over_six" are for rows to nearest.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"nvfp4: kind is {kind!r}; choose from {', '.join(get_args(Kind))}")
    if scales not in ("max", "four_over_six"):
        raise ValueError(f"nvfp4: scales of values are {scales!r}; choose from max, four_over_six")
    _check_scales(scales, kind, rounding, "rows")
    check_quantizable("nvfp4", x, _AXES[kind], BLOCK, batch_dims)
    if signs is not None:
        if kind != "columns":
            raise ValueError(
                f"nvfp4: signs are given and kind is {kind!r}; the transform is of columns"
            )
        check_operand("nvfp4", "signs", signs, (BLOCK,), x, same_dtype=False)
    places = placed("nvfp4", rounding, noise, x)
    wide, amax = _flat(x, amax, batch_dims)
    if scales == "four_over_six":
        quantizer = resolve("nvfp4 four_over_six", backend, _FAKE_FOUR_OVER_SIX, wide)
        return quantizer(wide.float(), amax).view(x.shape)
    quantizer = resolve("nvfp4", backend, _FAKE_QUANTIZE, wide)
    transform = None if signs is None else Transform(signs.float().contiguous(), x.dtype)
    return quantizer(wide, amax, kind, places, transform).view(x.shape)


_AXES = {"rows": ("d",), "tiles": ("rows", "d"), "columns": ("rows", "d")}


def _flat(x: Tensor, amax: Tensor | None, batch_dims: int) -> tuple[Tensor, Tensor | None]:
    """The operands of a backend: x [batch, row, d], in float32 on a CPU, and amax [batch]."""
    batch = x.shape[:batch_dims]
    wide = x.float() if x.is_cpu else x  # the kernels of a GPU read bfloat16 themselves
    wide = wide.contiguous().view(batch.numel(), -1 if x.numel() else 0, x.shape[-1])
    if amax is not None:
        check_operand("nvfp4", "amax", amax, batch, x, same_dtype=False)
        amax = amax.float().flatten().contiguous()
    return wide, amax


def _check_scales(scales: str, block: str, rounding: str, one: str = "1d") -> None:
    """`one` is what the caller's choices call 1-D blocks."""
    if scales not in get_args(Scales):
        raise ValueError(f"nvfp4: scales is {scales!r}; choose from {', '.join(get_args(Scales))}")
    if scales != "max" and (block != one or rounding != "nearest"):
        raise ValueError(
            f"nvfp4: scales is {scales!r} with block {block!r} and rounding {rounding!r}; it "
            f"is for block {one!r} and rounding 'nearest'"
        )
