"""The format of one operand of a product, and the values that it leaves.

A product is a sum over one axis of both operands, and blocks that share a scale lie along that
axis: the last one ("rows") or the first ("columns"). An axis that the block size does not divide
is padded with zeros, which change no scale, and is cut again. Only where the operand is rotated
along the axis of the sum, the padding stays: it is not zero any more, in neither operand.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops import mxfp8, nvfp4
from nemotron3.ops.backends import Backend
from nemotron3.ops.nvfp4 import SIGNS, hadamard
from nemotron3.ops.rounding import Noise

Along = Literal["rows", "columns"]
"""The axis of a product's sum: the last axis of a matrix, or the first."""

_BLOCKS = {"nvfp4": nvfp4.BLOCK, "mxfp8": mxfp8.BLOCK}


@dataclass(frozen=True, kw_only=True)
class OperandFormat:
    """How one operand of a product is rounded."""

    element: Literal["nvfp4", "mxfp8"] = "nvfp4"
    """The number format."""
    blocks: Literal["1d", "tiles"] = "1d"
    """16 elements along the sum (32 of MXFP8), or squares of 16 x 16, which are the same for the
    transposed matrix."""
    rounding: Literal["nearest", "stochastic", "ms_eden"] = "nearest"
    """MS-EDEN rotates the operand; the other operand of the product must have it too."""
    hadamard: bool = False
    """Whether columns get the random Hadamard transform; the other operand must have it too."""
    scales: Literal["max", "four_over_six"] = "max"
    """How block scales of NVFP4 are chosen (ops/nvfp4)."""

    def __post_init__(self) -> None:
        plain = self.blocks == "1d" and self.rounding == "nearest" and not self.hadamard
        if (self.element == "mxfp8" or self.scales == "four_over_six") and not plain:
            raise ValueError(
                f"{self}: MXFP8 and four-over-six are for 1-D blocks, rounded to nearest, without "
                "a transform"
            )

    @property
    def block(self) -> int:
        """Elements along the sum that share a scale."""
        return _BLOCKS[self.element]

    @property
    def is_random(self) -> bool:
        """Whether rounding takes noise."""
        return self.rounding != "nearest"

    def values(
        self,
        x: Float[Tensor, "*batch row column"],
        along: Along,
        *,
        noise: Noise | None = None,
        signs: Noise | None = None,
        backend: Backend = "auto",
    ) -> Float[Tensor, "*batch padded_row padded_column"]:
        """The values that the operand has in this format, in the dtype of `x`; of a batch, each
        matrix is a tensor of its own.

        `noise` is that of random rounding; its rows are those of tokens, and for stochastic
        rounding along columns also those that pad them (`padded`). `signs` names the rotation of
        MS-EDEN, which both operands of a product share.
        """
        x = x.detach()
        rows, width = x.shape[-2:]
        # Compiled quantizers read whole vectors along rows, whatever the axis of the blocks.
        pads_rows = along == "columns" or self.blocks == "tiles"
        below = padded(rows, self.block) - rows if pads_rows else 0
        right = padded(width, self.block) - width
        full = F.pad(x, (0, right, 0, below)) if below or right else x
        found = self._values(full, along, noise, signs, backend).to(x.dtype)
        if not self.is_rotated:
            return found[..., :rows, :width]
        return found[..., :width] if along == "columns" else found[..., :rows, :]

    def zeros_before(self, x: Float[Tensor, "*batch row column"], along: Along) -> Tensor:
        """The number of zeros that are rounded; a rotation by random signs leaves none."""
        if self.rounding == "ms_eden":
            return torch.zeros((), dtype=torch.int64, device=x.device)
        if self.hadamard and along == "columns":
            below = padded(x.shape[-2], self.block) - x.shape[-2]
            x = hadamard(F.pad(x.detach(), (0, 0, 0, below)).mT, self._signs(x)).to(x.dtype)
        return (x == 0).sum()

    def _signs(self, x: Tensor) -> Tensor:
        return torch.tensor(SIGNS, dtype=torch.float32, device=x.device)

    @property
    def is_rotated(self) -> bool:
        """Whether the values are those of a rotated operand, where blocks are along the sum."""
        return self.hadamard or self.rounding == "ms_eden"

    def _values(
        self,
        x: Tensor,
        along: Along,
        noise: Noise | None,
        signs: Noise | None,
        backend: Backend,
    ) -> Tensor:
        if not x.numel():
            return x
        batch_dims = x.dim() - 2
        if self.rounding == "ms_eden":
            assert noise is not None
            assert signs is not None
            return nvfp4.fake_ms_eden(x, along, signs, noise, backend=backend)
        if self.element == "mxfp8":
            return mxfp8.fake_quantize(x, along, backend=backend)
        if self.scales == "four_over_six":
            turned = x.mT if along == "columns" else x
            found = nvfp4.fake_quantize(
                turned, scales="four_over_six", batch_dims=batch_dims, backend=backend
            )
            return found.mT if along == "columns" else found
        own = self._signs(x) if self.hadamard and along == "columns" else None
        return nvfp4.fake_quantize(
            x,
            "tiles" if self.blocks == "tiles" else along,
            "stochastic" if self.is_random else "nearest",
            noise=noise,
            signs=own,
            batch_dims=batch_dims,
            backend=backend,
        )


def padded(size: int, block: int) -> int:
    """The size with which all blocks are whole."""
    return -(-size // block) * block
