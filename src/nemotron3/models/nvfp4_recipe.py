"""The published recipe of training in NVFP4: which products have which formats.

Super report, section 2.2, table 3, and Transformer Engine's NVFP4BlockScaling; docs/nvfp4.md
explains the ingredients, docs/training.md the use. By default:

    operand                          blocks      transform    rounding
    activations of fprop             16          -            nearest
    weights of fprop and dgrad       16 x 16     -            nearest
    gradients of dgrad               16          -            stochastic
    activations of wgrad             16 tokens   Hadamard     nearest
    gradients of wgrad               16 tokens   Hadamard     stochastic

Routed and shared experts, dense feed-forward layers and the input projections of Mamba are in
NVFP4, the output projections of Mamba in MXFP8. All else is in the dtype of activations: the last
15% of layers, attention and latent projections, the MTP block, embedding and output layer; and the
router is in float32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal, NamedTuple

from torch import nn

from nemotron3.errors import ConfigError
from nemotron3.models.checks import require_choice
from nemotron3.models.experts import RoutedExperts
from nemotron3.models.linear import Linear
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.ops.low_precision import (
    ExpertsQuantization,
    OperandFormat,
    Operands,
    Product,
    ProductFormats,
    ProductQuantization,
)
from nemotron3.ops.weights import QuantizedWeight

PRODUCTS: tuple[Product, ...] = ("fprop", "dgrad", "wgrad")
ModuleFormat = Literal["nvfp4", "mxfp8"]

_MODULES: tuple[tuple[str, ModuleFormat], ...] = (
    ("in_proj", "nvfp4"),
    ("out_proj", "mxfp8"),
    ("experts", "nvfp4"),
    ("shared_experts.*", "nvfp4"),
    ("up_proj", "nvfp4"),
    ("gate_proj", "nvfp4"),
    ("down_proj", "nvfp4"),
)
"""Formats by the names of modules in their mixer; what no line names stays as it is."""
_MX = OperandFormat(element="mxfp8")
_MXFP8 = ProductFormats(
    fprop=Operands(_MX, _MX), dgrad=Operands(_MX, _MX), wgrad=Operands(_MX, _MX)
)


@dataclass(frozen=True, kw_only=True)
class NVFP4Config:
    """The ingredients of training in NVFP4; the defaults are the published recipe."""

    products: tuple[Product, ...] = PRODUCTS
    """Products whose operands are rounded: the forward pass, and the gradients of inputs and of
    weights."""
    weights: Literal["tiles", "1d"] = "tiles"
    """Blocks of weights: 16 x 16, the same in forward and backward pass, or 16 along each sum."""
    transform: Literal["hadamard", "none"] = "hadamard"
    """Transform of both operands of the product for a weight's gradient."""
    gradients: Literal["stochastic", "nearest", "ms_eden"] = "stochastic"
    """Rounding of gradients. MS-EDEN (Quartet II) rounds both operands of both backward products,
    with a rotation of its own."""
    scales: Literal["max", "four_over_six"] = "max"
    """Block scales of the operands of the forward pass in 1-D blocks: 6 for the largest number, or
    4 or 6, whichever has the smaller error."""
    high_precision_tail: float = 0.15
    """Share of the layers, the last ones, that stay in high precision; rounded up to whole
    layers."""
    fprop_steps: int | None = None
    """Updates whose forward pass is rounded; in those that follow it is in high precision, and
    gradients go on being rounded. None for all updates."""
    seed: int = 0
    """Seed of stochastic rounding."""

    def __post_init__(self) -> None:
        require_choice(self, "weights", ("tiles", "1d"))
        require_choice(self, "transform", ("hadamard", "none"))
        require_choice(self, "gradients", ("stochastic", "nearest", "ms_eden"))
        require_choice(self, "scales", ("max", "four_over_six"))
        unknown = set(self.products) - set(PRODUCTS)
        if unknown or not self.products or len(set(self.products)) < len(self.products):
            raise ConfigError(
                f"is {list(self.products)}; name one or more of {', '.join(PRODUCTS)}, each once",
                field="products",
            )
        if not 0 <= self.high_precision_tail < 1:
            raise ConfigError(
                f"is {self.high_precision_tail}; it is a share of the layers, from 0 to below 1",
                field="high_precision_tail",
            )
        if self.fprop_steps is not None:
            self._check_switch(self.fprop_steps)
        if self.gradients == "ms_eden" and self.transform == "none":
            raise ConfigError(
                "is 'none' and {other} is 'ms_eden', which rotates its operands by a Hadamard "
                "transform; leave it at 'hadamard'",
                field="transform",
                other="gradients",
            )

    def _check_switch(self, fprop_steps: int) -> None:
        if fprop_steps < 1:
            raise ConfigError(
                f"is {fprop_steps}; it must be 1 or more. For a forward pass that is never rounded "
                "leave fprop out of {other}",
                field="fprop_steps",
                other="products",
            )
        if "fprop" not in self.products or self.products == ("fprop",):
            raise ConfigError(
                f"is {fprop_steps} and {{other}} is {list(self.products)}; it ends the rounding of "
                "fprop while gradients go on being rounded, so name fprop and dgrad or wgrad",
                field="fprop_steps",
                other="products",
            )

    def formats(self) -> ProductFormats:
        """Those of a product in NVFP4."""
        forward = OperandFormat(scales=self.scales)
        weight = OperandFormat(blocks="tiles") if self.weights == "tiles" else forward
        if self.gradients == "ms_eden":
            rotated = OperandFormat(rounding="ms_eden")
            dgrad = wgrad = Operands(rotated, rotated)
        else:
            plain = OperandFormat(blocks=weight.blocks)
            dgrad = Operands(OperandFormat(rounding=self.gradients), plain)
            hadamard = self.transform == "hadamard"
            wgrad = Operands(
                OperandFormat(rounding=self.gradients, hadamard=hadamard),
                OperandFormat(hadamard=hadamard),
            )
        return ProductFormats(
            fprop=Operands(forward, weight) if "fprop" in self.products else None,
            dgrad=dgrad if "dgrad" in self.products else None,
            wgrad=wgrad if "wgrad" in self.products else None,
        )

    def layers(self, num_layers: int) -> int:
        """The number of layers, from the first, that have products in few bits."""
        return num_layers - math.ceil(self.high_precision_tail * num_layers - 1e-9)


class QuantizedModule(NamedTuple):
    """A module of products whose operands are rounded."""

    layer: int
    """Its layer in the backbone."""
    name: str
    """Its name in the mixer."""
    format: ModuleFormat
    module: Linear | RoutedExperts


def quantized_modules(model: LanguageModel, config: NVFP4Config) -> Iterator[QuantizedModule]:
    """All of them, first layer to last.

    Raises ConfigError where a format's blocks do not fit a module's inputs, or where its weight has
    a number format already.
    """
    layers = model.backbone.layers
    for index, block in enumerate(list(layers)[: config.layers(len(layers))]):
        mixer = block.mixer
        assert isinstance(mixer, nn.Module)
        for name, module in mixer.named_modules():
            if isinstance(module, (Linear, RoutedExperts)) and (found := _format_of(name)):
                _check_module(f"backbone.layers.{index}.mixer.{name}", module, found)
                yield QuantizedModule(index, name, found, module)


def quantize_products(model: LanguageModel, config: NVFP4Config) -> None:
    """Give the modules of products their formats."""
    formats = {"nvfp4": config.formats(), "mxfp8": _only(_MXFP8, config.products)}
    for layer, name, found, module in quantized_modules(model, config):
        own = [
            ProductQuantization(
                formats[found],
                config.seed,
                layer,
                own_name,
                model.rounding_position,
                config.fprop_steps,
            )
            for own_name in _product_names(name, module)
        ]
        if isinstance(module, RoutedExperts):
            module.quantization = ExpertsQuantization(*own)
        else:
            (module.quantization,) = own


def kept_weights(model: LanguageModel, config: NVFP4Config) -> set[str]:
    """Names of the weights of which training keeps rounded values from fprop to dgrad."""
    formats = config.formats()
    if not formats.shares_weight or formats.fprop is None:
        return set()
    return {
        f"backbone.layers.{layer}.mixer.{name}.{weight}"
        for layer, name, found, module in quantized_modules(model, config)
        for weight in _weights(module)
        if found == "nvfp4"
    }


def _only(formats: ProductFormats, products: tuple[Product, ...]) -> ProductFormats:
    return ProductFormats(
        **{name: getattr(formats, name) if name in products else None for name in PRODUCTS}
    )


def _product_names(name: str, module: nn.Module) -> list[str]:
    return [f"{name}.up", f"{name}.down"] if isinstance(module, RoutedExperts) else [name]


def _format_of(name: str) -> ModuleFormat | None:
    return next((found for pattern, found in _MODULES if fnmatch(name, pattern)), None)


def _weights(module: Linear | RoutedExperts) -> tuple[str, ...]:
    return ("up_proj", "down_proj") if isinstance(module, RoutedExperts) else ("weight",)


def _check_module(path: str, module: Linear | RoutedExperts, found: ModuleFormat) -> None:
    block = {"nvfp4": 16, "mxfp8": 32}[found]
    for name in _weights(module):
        weight = getattr(module, name)
        if isinstance(weight, QuantizedWeight):
            raise ConfigError(
                f"{path}.{name} is in {weight.format}; training in NVFP4 rounds a float32 weight "
                "in every step, so convert the model first (models.precision.convert_weights)"
            )
        if weight.shape[-1] % block:
            raise ConfigError(
                f"{path}.{name} has {weight.shape[-1]} inputs, and blocks of {found.upper()} are "
                f"of {block}; choose a size of the model that {block} divides, or precision recipe "
                "'plain'"
            )
