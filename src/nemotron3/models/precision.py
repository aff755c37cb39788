"""The dtype of a model's activations and the number formats of its products, as data.

Parameters keep their own dtype: float32 masters in training, the checkpoint's dtype in
inference. Activations have the dtype set here, and every product runs in the dtype of its
activations; norms, router, scan and loss always compute in float32. Beside an adapter, matrices of
products and embedding are frozen, and have the dtype of activations (recipes/adapters.py).

A recipe of few bits (nvfp4_recipe.py) rounds the operands of products in training. It is applied
once, to the modules that compute products: they hold the formats, and nothing else knows them.

The matrices of dense layers, experts and output layer may have a narrower number format
(ops/weights). The products of such a model are the same, but these matrices have no gradients: the
model is for inference, or for training other parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nemotron3.errors import ConfigError
from nemotron3.models.allocation import allocate
from nemotron3.models.block import Block
from nemotron3.models.checks import require_choice
from nemotron3.models.config import ModelConfig
from nemotron3.models.experts import RoutedExperts, Router
from nemotron3.models.linear import Linear
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.nvfp4_recipe import NVFP4Config, kept_weights, quantize_products
from nemotron3.models.parameter import state_tensors, use_weight_format
from nemotron3.ops.low_precision import ExpertsQuantization
from nemotron3.ops.weights import WeightFormat, dequantized


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats of a run."""

    activations: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and of all products. On a CPU bfloat16 is faster where the processor
    multiplies it (AVX512_BF16), and slower elsewhere (docs/speed.md)."""

    recipe: Literal["plain", "nvfp4"] = "plain"
    """`plain` computes all products in the dtype of activations; `nvfp4` rounds the operands of
    most products to four bits, as Super and Ultra were trained (docs/nvfp4.md)."""
    nvfp4: NVFP4Config = field(default_factory=NVFP4Config)
    """The ingredients of the recipe `nvfp4`."""

    def __post_init__(self) -> None:
        require_choice(self, "activations", ("float32", "bfloat16"))
        require_choice(self, "recipe", ("plain", "nvfp4"))
        if self.recipe == "plain" and self.nvfp4 != NVFP4Config():
            raise ConfigError(
                "has values of its own and {other} is 'plain', so they would have no effect; set "
                "{other} to 'nvfp4', or leave them out",
                field="nvfp4",
                other="recipe",
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.activations]

    @property
    def unrounded(self) -> "PrecisionConfig":
        """The same dtype of activations, without rounded operands: that of the trained model."""
        return PrecisionConfig(activations=self.activations)


def rounded_weights(model: LanguageModel, config: PrecisionConfig) -> set[str]:
    """Names of weights of which training keeps rounded values for the backward pass."""
    return kept_weights(model, config.nvfp4) if config.recipe == "nvfp4" else set()


def has_rounded_products(model: LanguageModel) -> bool:
    """Whether a recipe of few bits applies to the model."""
    modules = (m for m in model.modules() if isinstance(m, (Linear, RoutedExperts)))
    return any(module.quantization is not None for module in modules)


def apply_precision(model: LanguageModel, config: PrecisionConfig) -> None:
    """Set the dtype of the model's activations, and the formats of its products.

    Raises ConfigError where a module's size does not fit its format.
    """
    model.activation_dtype = config.dtype
    for module in model.modules():
        if isinstance(module, (Linear, RoutedExperts)):
            module.quantization = None
    if config.recipe == "nvfp4":
        quantize_products(model, config.nvfp4)


def check_precision(model: ModelConfig, config: PrecisionConfig) -> None:
    """Raise ConfigError where a model of this configuration cannot have this precision."""
    if config.recipe != "plain":
        with torch.device("meta"):
            apply_precision(LanguageModel(model), config)


class ProductPrecision(NamedTuple):
    """A module of products, and what it runs in."""

    part: Literal["backbone", "mtp", "output"]
    kind: str
    """The kind of layer and the module in it, such as `mamba in_proj`."""
    layer: int
    """Its layer in its part; 0 for the output layer."""
    format: str
    """`nvfp4` or `mxfp8`, `activations` for the dtype of activations, or `float32`."""
    parameters: int


def product_precisions(model: LanguageModel, config: PrecisionConfig) -> Iterator[ProductPrecision]:
    """What every product with a weight runs in, first layer to last; the model may be on meta."""
    apply_precision(model, config)
    yield from _of_blocks("backbone", model.backbone.layers)
    if model.mtp is not None:
        size = _num_parameters(model.mtp.input.eh_proj)
        yield ProductPrecision("mtp", "input eh_proj", 0, "activations", size)
        yield from _of_blocks("mtp", model.mtp.layers)
    size = model.output_weight.shape.numel()
    yield ProductPrecision("output", "layer", 0, "activations", size)


def _of_blocks(
    part: Literal["backbone", "mtp"], layers: nn.ModuleList
) -> Iterator[ProductPrecision]:
    for index, block in enumerate(layers):
        assert isinstance(block, Block)
        for name, module in block.mixer.named_modules():
            if isinstance(module, (Linear, RoutedExperts, Router)):
                kind, size = f"{block.kind.label} {name}", _num_parameters(module)
                yield ProductPrecision(part, kind, index, _format_of(module), size)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _format_of(module: Linear | RoutedExperts | Router) -> str:
    if isinstance(module, Router):
        return "float32"
    quantization = module.quantization
    if isinstance(quantization, ExpertsQuantization):
        quantization = quantization.up
    return "activations" if quantization is None else quantization.formats.element


def convert_weights(model: LanguageModel, weights: WeightFormat | None) -> LanguageModel:
    """A copy of the model with its matrices in another number format.

    None dequantizes them to the dtype of the embedding, which is never quantized.
    """
    with torch.device("meta"):
        converted = type(model)(model.config)
        if weights is not None:
            use_weight_format(converted, weights)
    allocate(converted, model.device, model.backbone.embeddings.weight.dtype)
    values = dict(state_tensors(model))
    with torch.no_grad():
        for name, target in state_tensors(converted):
            if isinstance(target, Tensor):
                target.copy_(dequantized(values[name]))
            else:
                target.copy_(values[name])
    converted.activation_dtype, converted.companions = model.activation_dtype, model.companions
    return converted
