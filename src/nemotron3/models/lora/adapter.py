"""Adapters in memory: added to a model to be trained, taken from it, merged into weights.

    add_lora(model, LoRAConfig(rank=16), seed=0)      # all else is frozen
    adapter = adapter_of(model)                       # the changes by product
    merge_adapter(other, adapter)                     # into the weights of a model without one
    merge_own_adapter(model)                          # into its own, when training has ended
    served = shared_model(model, adapter)             # a model of its own for a few matrices

A product is named as in files: `backbone.layers.0.mixer.in_proj`, and for stacked experts
`backbone.layers.1.mixer.experts.up_proj`. What may be adapted is what may be quantized: the
matrices that are used in products only (models/parameter.py). Routers are not among them.

A product whose weight is quantized stays so: its change is not merged but stands beside it, in
training and in a `shared_model`. Only `dequantized_with` makes plain weights of both.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemotron3.errors import ConfigError
from nemotron3.models.adapted_weight import AdaptedWeight, LowRank
from nemotron3.models.initialization import initialize
from nemotron3.models.lora.config import ALL_LINEAR, LoRAConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.models.parameter import DeclaredModule
from nemotron3.models.precision import convert_weights
from nemotron3.ops.weights import QuantizedWeight, Weight

Adapter = Mapping[str, LowRank]
"""The changes of an adapter, by the names of their products."""

_OUTPUT_LAYER = "lm_head"
_REFUSED_BY_PEFT = "out_proj"


class Product(NamedTuple):
    """A place in a model that holds the weight of a product."""

    module: DeclaredModule
    attribute: str

    @property
    def weight(self) -> Weight | AdaptedWeight:
        """What is there."""
        return getattr(self.module, self.attribute)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix [out, in], or of all experts'."""
        return self.weight.shape


def products(model: nn.Module) -> dict[str, Product]:
    """Everything that may be adapted, by name."""
    return {
        path if name == "weight" else f"{path}.{name}": Product(module, name)
        for path, module in model.named_modules()
        if isinstance(module, DeclaredModule)
        for name, spec in module.specs.items()
        if spec.quantizes
    }


def chosen_products(model: nn.Module, targets: tuple[str, ...]) -> dict[str, Product]:
    """The products that `targets` name; ConfigError for a target that names none."""
    found = products(model)
    chosen: set[str] = set()
    for target in targets:
        named = {name for name in found if _is_named(name, target)}
        if not named:
            raise ConfigError(_no_product(target, found), field="targets")
        chosen |= named
    return {name: product for name, product in found.items() if name in chosen}


def _is_named(name: str, target: str) -> bool:
    if target == ALL_LINEAR:
        return name != _OUTPUT_LAYER and not name.endswith(f".{_REFUSED_BY_PEFT}")
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


def _no_product(target: str, found: Mapping[str, Product]) -> str:
    ends = {".".join(name.split(".")[-length:]) for name in found for length in (1, 2)}
    candidates = sorted(ends | found.keys())
    close = get_close_matches(target, candidates, n=3, cutoff=0.5)
    last = sorted({name.rpartition(".")[2] for name in found})
    hint = f"; the closest are {', '.join(close)}" if close else ""
    return (
        f"has {target!r}, which names no product of the model{hint}. There are {', '.join(last)}, "
        "and routers, norms and embeddings are never adapted"
    )


def add_lora(model: LanguageModel, config: LoRAConfig, *, seed: int) -> list[str]:
    """Give a model an adapter that changes nothing yet; returns the adapted products.

    All parameters but those of the adapter are frozen; quantized weights stay as they are. Raises
    ConfigError for a target that names no product, and for a model with an adapter.
    """
    if is_adapted(model):
        raise ConfigError("the model has an adapter already; merge that one first")
    chosen = chosen_products(model, config.targets)
    model.requires_grad_(False)
    for product in chosen.values():
        base = product.weight
        assert isinstance(base, nn.Parameter | QuantizedWeight)
        delattr(product.module, product.attribute)
        adapted = AdaptedWeight(base, rank=config.rank, scale=config.scale)
        setattr(product.module, product.attribute, adapted)
    initialize(model, model.config, seed, names=trained_tensors(model).keys())
    return list(chosen)


def has_quantized_base(model: nn.Module) -> bool:
    """Whether some change stands beside a quantized weight, so that the model cannot be merged."""
    return any(
        isinstance(module, AdaptedWeight) and isinstance(module.base, QuantizedWeight)
        for module in model.modules()
    )


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has an adapter beside its weights."""
    return any(isinstance(module, AdaptedWeight) for module in model.modules())


def changed_parameters(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the tensors that an adapter changes, in a model without one or a `shared_model`.

    Those of a change beside a quantized weight are its own.
    """
    names: list[str] = []
    for name, product in chosen_products(model, config.targets).items():
        own = f"{name}.weight" if product.attribute == "weight" else name
        is_apart = isinstance(product.weight, AdaptedWeight | QuantizedWeight)
        names += [f"{own}.A", f"{own}.B"] if is_apart else [own]
    return names


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The part of `state_dict` that training changes: all of it, or the adapter's parameters."""
    state = model.state_dict()
    adapted = [path for path, m in model.named_modules() if isinstance(m, AdaptedWeight)]
    if not adapted:
        return state
    names = [f"{path}.{part}" for path in adapted for part in ("A", "B")]
    return {name: state[name] for name in names}


def adapter_of(model: nn.Module) -> dict[str, LowRank]:
    """The adapter of a model, in the memory of its parameters and without gradients."""
    adapter: dict[str, LowRank] = {}
    for name, product in products(model).items():
        if isinstance(weight := product.weight, AdaptedWeight):
            change = weight.change
            adapter[name] = change._replace(A=change.A.detach(), B=change.B.detach())
    return adapter


def load_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter into the model's own, which must be of the same products and ranks."""
    own = adapter_of(model)
    assert own.keys() == adapter.keys()
    for name, change in adapter.items():
        assert own[name].scale == change.scale
        own[name].A.copy_(change.A)
        own[name].B.copy_(change.B)


@torch.no_grad()
def with_own_changes(model: LanguageModel, config: LoRAConfig) -> LanguageModel:
    """A model that shares all tensors but copies of those that an adapter changes.

    `model` has none beside its weights; it may have one merged.
    """
    shared = shared_model(model)
    for module, attribute in chosen_products(shared, config.targets).values():
        weight = getattr(module, attribute)
        if isinstance(weight, Tensor):
            copied = weight.detach().clone()
            setattr(module, attribute, nn.Parameter(copied, requires_grad=False))
    return shared


@torch.no_grad()
def merge_adapter(model: LanguageModel, adapter: Adapter) -> None:
    """Add an adapter to the plain weights of a model without one, in their memory and dtype."""
    found = products(model)
    for name, change in adapter.items():
        weight = found[name].weight
        assert isinstance(weight, Tensor)
        weight.copy_(change.added_to(weight, weight.dtype))


@torch.no_grad()
def dequantized_with(model: LanguageModel, adapter: Adapter) -> LanguageModel:
    """A model of plain weights, in the dtype of the embedding, with an adapter merged.

    A dequantized matrix and its change are added up before they are rounded.
    """
    merged, found = convert_weights(model, None), products(model)
    targets = products(merged)
    for name, change in adapter.items():
        target, weight = targets[name].weight, found[name].weight
        assert isinstance(target, Tensor)
        assert not isinstance(weight, AdaptedWeight)
        target.copy_(change.added_to(weight, target.dtype))
    return merged


@torch.no_grad()
def merge_own_adapter(model: LanguageModel) -> None:
    """Make of a model with an adapter one without, in the memory of its plain weights."""
    for product in products(model).values():
        if isinstance(weight := product.weight, AdaptedWeight):
            base = weight.base
            assert isinstance(base, nn.Parameter)
            base.copy_(weight.value(base.dtype))
            delattr(product.module, product.attribute)
            setattr(product.module, product.attribute, base)


@torch.no_grad()
def merge_into(served: LanguageModel, model: LanguageModel) -> None:
    """Write the adapted weights of `model` into those of a `shared_model` of it, in place."""
    targets = products(served)
    for name, product in products(model).items():
        if isinstance(weight := product.weight, AdaptedWeight):
            target = targets[name].weight
            if isinstance(target, AdaptedWeight):
                target.A.copy_(weight.A)
                target.B.copy_(weight.B)
            else:
                assert isinstance(target, Tensor)
                target.copy_(weight.value(target.dtype))


@torch.no_grad()
def shared_model(model: LanguageModel, adapter: Adapter | None = None) -> LanguageModel:
    """A model with all tensors of `model`, but for copies of those that an adapter changes.

    The copies are in the dtype of activations, to which training rounds the same sums. Of a
    quantized weight there is none: it is shared, and the change has memory of its own beside it.
    Without an `adapter` it is the one of `model`. An adapter of no products gives the base model of
    an adapted one. Writes into a shared tensor are seen by both models.
    """
    if adapter is None:
        adapter = adapter_of(model)
    with torch.device("meta"):
        shared = type(model)(model.config)
    for path, module in model.named_modules():
        if isinstance(module, AdaptedWeight | QuantizedWeight):
            continue
        target = shared.get_submodule(path)
        for name, parameter in module.named_parameters(recurse=False):
            setattr(target, name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            target.register_buffer(name, buffer)
    targets = products(shared)
    for name, product in products(model).items():
        weight = product.weight
        base = weight.base if isinstance(weight, AdaptedWeight) else weight
        if name in adapter and isinstance(base, QuantizedWeight):
            base = AdaptedWeight.frozen(base, adapter[name])
        elif name in adapter:
            merged = adapter[name].added_to(base, model.compute_dtype)
            base = nn.Parameter(merged, requires_grad=False)
        module, attribute = targets[name]
        delattr(module, attribute)
        setattr(module, attribute, base)
    shared.activation_dtype, shared.companions = model.activation_dtype, model.companions
    shared.mapped_bytes = model.mapped_bytes
    return shared
