"""The formats of a product with a weight and of the two products for its gradients.

For y = x W^T with tokens as rows there are three products, named as in Transformer Engine:

    fprop   y  = x W^T        sum over inputs
    dgrad   dx = dy W         sum over outputs
    wgrad   dW = dy^T x       sum over tokens

Each has two operands, each operand a format of its own. All sums are in float32 on a CPU.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nemotron3.ops.backends import Backend
from nemotron3.ops.low_precision.operand import OperandFormat, padded
from nemotron3.ops.rounding import Noise

Product = Literal["fprop", "dgrad", "wgrad"]

PADDING = 1 << 31
"""The place of the first row that pads a matrix, beyond those of tokens."""


class Operands(NamedTuple):
    """The formats of both operands of a product, the one of rows of `y` first."""

    first: OperandFormat
    second: OperandFormat


@dataclass(frozen=True, kw_only=True)
class ProductFormats:
    """Formats of the three products; None for one whose operands are not rounded."""

    fprop: Operands | None
    """x and W."""
    dgrad: Operands | None
    """dy and W."""
    wgrad: Operands | None
    """dy and x."""

    @property
    def shares_weight(self) -> bool:
        """Whether dgrad multiplies with the values that W has in fprop."""
        if self.fprop is None or self.dgrad is None:
            return self.fprop is self.dgrad
        return self.fprop.second == self.dgrad.second and self.fprop.second.blocks == "tiles"

    @property
    def element(self) -> str:
        """The number format of its operands."""
        given = [of.first for of in (self.fprop, self.dgrad, self.wgrad) if of is not None]
        return given[0].element

    @property
    def is_compiled(self) -> bool:
        """Whether compiled operations can round activations and gradients so: all that a recipe of
        NVFP4 combines (models/nvfp4_recipe.py). They take the weights rounded, in any format."""
        fprop, dgrad, wgrad = self.fprop, self.dgrad, self.wgrad
        return (
            (fprop is None or fprop.first == OperandFormat(scales=fprop.first.scales))
            and (dgrad is None or dgrad.first == OperandFormat(rounding=dgrad.first.rounding))
            and (wgrad is None or _is_pair_of_wgrad(*wgrad))
        )


def _is_pair_of_wgrad(dy: OperandFormat, x: OperandFormat) -> bool:
    if dy.rounding == "ms_eden":
        return dy == x == OperandFormat(rounding="ms_eden")
    return dy == OperandFormat(rounding=dy.rounding, hadamard=dy.hadamard) and x == OperandFormat(
        hadamard=dy.hadamard
    )


class FlushedValues:
    """Counts of values that rounding made zero, of each layer and product."""

    def __init__(self) -> None:
        self._counts: dict[tuple[int, Product], list[Tensor]] = {}

    def add(self, layer: int, product: Product, flushed: Tensor, total: int) -> None:
        """Count an operand: `flushed` of `total` values became zero and were not before."""
        number = torch.tensor(float(total), dtype=torch.float64, device=flushed.device)
        pair = torch.stack([flushed.double(), number])
        self._counts.setdefault((layer, product), []).append(pair)

    def shares(self) -> dict[tuple[int, Product], float]:
        """Flushed values over all values of the operands, by layer and product."""
        sums = {key: torch.stack(pairs).sum(0) for key, pairs in sorted(self._counts.items())}
        return {key: float(flushed / total) for key, (flushed, total) in sums.items() if total}


@dataclass(eq=False)
class RoundingPosition:
    """Where a training run is: it decides the noise of stochastic rounding.

    A model has one, and the training step sets it before each microbatch.
    """

    step: int = 0
    """Updates made before this one."""
    first_token: int = 0
    """Tokens of the update's batch before this microbatch."""
    flushed: FlushedValues | None = None
    """Where products count values that become zero; None to save the time."""


@dataclass(frozen=True, eq=False)
class ProductQuantization:
    """What a module of products holds: formats, and what names its tensors in the noise."""

    formats: ProductFormats
    seed: int
    layer: int
    module: str
    """The module's name in its layer."""
    position: RoundingPosition
    fprop_steps: int | None = None
    """Updates whose forward pass has rounded operands; those that follow round gradients only.
    None for all."""

    def here(self) -> "ProductQuantization":
        """The same at the present position, for this forward pass and its backward pass."""
        position, formats = replace(self.position), self.formats
        if self.fprop_steps is not None and position.step >= self.fprop_steps:
            formats = replace(formats, fprop=None)
        return replace(self, formats=formats, position=position)

    def noise(self, tensor: str, rows: Tensor | None = None) -> Noise:
        """The noise of a tensor; `rows` are the places of its rows in the update's batch.

        Without them it is another noise in each microbatch.
        """
        of = tensor if rows is not None else f"{tensor} from {self.position.first_token}"
        role = f"{self.module} {of}"
        return Noise(self.seed, self.position.step, self.layer, role, rows=rows)

    def values(
        self,
        product: Product,
        tensor: str,
        format_: OperandFormat,
        x: Tensor,
        *,
        rows: Tensor | None = None,
        backend: Backend = "auto",
    ) -> Tensor:
        """The values of an operand of a product; `rows` are places of tokens, if it has them."""
        along = "columns" if product == "wgrad" or (product, tensor) == ("dgrad", "w") else "rows"
        noise = signs = None
        if format_.rounding == "ms_eden":
            turned = along == "columns"
            noise = self.noise(f"{product} {tensor}", None if turned else rows)
            signs = self.noise(f"{product} signs")
        elif format_.is_random:
            if rows is not None and along == "columns":
                rows = with_padding(rows, padded(len(rows), format_.block))
            noise = self.noise(f"{product} {tensor}", rows)
        found = format_.values(x, along, noise=noise, signs=signs, backend=backend)
        if self.position.flushed is not None:
            zeros = (found == 0).sum() - format_.zeros_before(x, along)
            self.count_flushed(product, zeros, found.numel())
        return found

    def count_flushed(self, product: Product, flushed: Tensor, total: int) -> None:
        """Add to the counts of this layer, in a step that measures."""
        if self.position.flushed is not None:
            self.position.flushed.add(self.layer, product, flushed, total)

    def stacked_values(
        self, product: Product, tensor: str, format_: OperandFormat, matrices: Tensor
    ) -> Tensor:
        """The values of a stack of matrices, each a tensor of its own."""
        if format_.element == "nvfp4" and format_.rounding != "stochastic":
            return self.values(product, tensor, format_, matrices).contiguous()
        values = [self.values(product, tensor, format_, matrix) for matrix in matrices]
        return torch.stack(values)

    def rows_of_tokens(self, tokens: int, device: torch.device) -> Tensor:
        """The place of each token of this microbatch in the update's batch."""
        first = self.position.first_token
        return torch.arange(first, first + tokens, device=device)


@dataclass(frozen=True, eq=False)
class ExpertsQuantization:
    """What a module of routed experts holds, for both of their matrices."""

    up: ProductQuantization
    down: ProductQuantization

    def here(self) -> "ExpertsQuantization":
        """The same at the present position, for the backward pass of this forward pass."""
        return replace(self, up=self.up.here(), down=self.down.here())


def with_padding(rows: Tensor, size: int) -> Tensor:
    """Places of rows, and of those that pad them to `size`, which have none among the tokens."""
    pads = torch.arange(PADDING, PADDING + size - len(rows), device=rows.device)
    return torch.cat([rows, pads])
