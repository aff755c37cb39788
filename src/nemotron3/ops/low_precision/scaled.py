"""Products in NVFP4 by the processor: PyTorch's scaled product, on Blackwell.

Its operands are packed, both with blocks along the axis of the sum, and its block scales lie in
the order in which cuBLAS reads them ("1D block scaling factors layout" of its documentation): in
tiles of 128 rows and 4 scales, a row of the tile 16 bytes after the row before it, and every 32
rows 4 bytes further. The axis of the sum has to be a multiple of 32, and the columns of the result
one of 16; both are padded with zeros.

It has been tested for shapes and layouts on a CPU, and has not run on such a GPU.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.backends import has_capability
from nemotron3.ops.low_precision.operand import OperandFormat, padded
from nemotron3.ops.low_precision.product import Operands, Product, ProductQuantization
from nemotron3.ops.nvfp4 import SIGNS, NVFP4Tensor, hadamard, quantize

_LEAST_CAPABILITY = (10, 0)
_SUM, _COLUMNS = 32, 16
"""What the axis of the sum and the columns of the result are multiples of."""
_TILE_ROWS, _TILE_SCALES = 128, 4


def is_available(device: torch.device) -> bool:
    """Whether products in NVFP4 run on this device."""
    return hasattr(F, "scaled_mm") and has_capability(device, _LEAST_CAPABILITY)


def runs_scaled(x: Tensor, q: ProductQuantization) -> bool:
    """Whether the products of these activations run in NVFP4: in bfloat16, by the recipe."""
    formats = q.formats
    return (
        x.dtype == torch.bfloat16
        and formats.element == "nvfp4"
        and formats.is_compiled
        and all(
            operand.scales == "max" and operand.rounding != "ms_eden"
            for of in (formats.fprop, formats.dgrad, formats.wgrad)
            for operand in of or ()
        )
        and is_available(x.device)
    )


def scaled_product(
    product: Product,
    first: Tensor,
    second: Tensor,
    operands: Operands,
    q: ProductQuantization,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """The result of `product`: of x and W, of dy and W, or of dy and x, as they are stored.

    `rows` are the places of tokens in the noise of dgrad; that of wgrad differs between
    microbatches.
    """
    left = first.T if product == "wgrad" else first
    right = second if product == "fprop" else second.T
    one = _packed(product, "first", left, operands.first, q, rows)
    two = _packed(product, "second", right, operands.second, q, rows)
    return _multiply(one, two, first.dtype)[: left.shape[0], : right.shape[0]]


def _packed(
    product: Product,
    tensor: str,
    x: Float[Tensor, "row sum"],
    of: OperandFormat,
    q: ProductQuantization,
    rows: Tensor | None,
) -> NVFP4Tensor:
    """An operand with blocks along its last axis, which is padded as the product needs it."""
    below = padded(len(x), _COLUMNS) - len(x)
    right = padded(x.shape[1], _SUM) - x.shape[1]
    x = F.pad(x.detach(), (0, right, 0, below)).contiguous()
    if of.hadamard:
        signs = torch.tensor(SIGNS, dtype=torch.float32, device=x.device)
        x = hadamard(x.float(), signs).to(x.dtype)
    if of.blocks == "tiles":
        return quantize(x, "2d")
    if not of.is_random:
        return quantize(x)
    if product == "dgrad" and rows is not None:
        rows = torch.cat([rows, torch.zeros(below, dtype=rows.dtype, device=rows.device)])
        return quantize(x, rounding="stochastic", noise=q.noise("dgrad dy", rows))
    return quantize(x, rounding="stochastic", noise=q.noise(f"{product} {tensor} packed"))


def _multiply(left: NVFP4Tensor, right: NVFP4Tensor, dtype: torch.dtype) -> Tensor:
    """left right^T."""
    scaling, swizzle = F.ScalingType, F.SwizzleType
    recipe = [scaling.BlockWise1x16, scaling.TensorWise]
    layout = [swizzle.SWIZZLE_32_4_4, swizzle.NO_SWIZZLE]
    return F.scaled_mm(
        left.codes.view(torch.float4_e2m1fn_x2),
        right.codes.view(torch.float4_e2m1fn_x2).T,
        [tiled(left.row_scales), left.tensor_scale],
        recipe,
        [tiled(right.row_scales), right.tensor_scale],
        recipe,
        swizzle_a=layout,
        swizzle_b=layout,
        output_dtype=dtype,
    )


def tiled(scales: Tensor) -> Tensor:
    """Block scales [row, block] in the order of cuBLAS, padded with zeros to whole tiles."""
    rows, blocks = scales.shape
    below, right = padded(rows, _TILE_ROWS) - rows, padded(blocks, _TILE_SCALES) - blocks
    whole = F.pad(scales.view(torch.uint8), (0, right, 0, below))
    tiles = whole.view(-1, 4, 32, whole.shape[1] // _TILE_SCALES, _TILE_SCALES)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e4m3fn)
