"""Declarations of parameters, made once by the module that owns the parameters.

A declaration has the initial value, whether weight decay applies, and in which dtypes the parameter
may be kept. Memory (allocation.py), initial values (initialization.py)
and the optimizer's groups read it, so none of them has a list of names.

    class Gain(DeclaredModule):
        weight: nn.Parameter

        def __init__(self, size: int) -> None:
            super().__init__()
            self.declare("weight", (size,), init=Constant(1.0), decays=False)

Declarations belong to the module, because every conversion replaces the tensor. So they survive
`deepcopy`, pickling, `.to` and `load_state_dict(assign=True)`, and so does the dtype of a parameter
that is declared to stay in float32.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nemotron3.errors import ConfigError, OperandError
from nemotron3.models.initial_values import InitialValue
from nemotron3.ops.weights import FORMATS, QuantizedWeight, Weight


@dataclass(frozen=True, kw_only=True)
class ParameterSpec:
    """The declaration of one parameter or buffer."""

    init: InitialValue
    """The initial value."""
    decays: bool
    """Whether weight decay applies: to matrices, but not to parameters of scale or dynamics."""
    keep_float32: bool
    """Whether it is float32 or wider in any model, because its rounding errors would accumulate."""
    quantizes: bool = False
    """Whether it may have a narrower number format, or an adapter, because it is used in products
    only."""
    embeds: bool = False
    """Whether it is a table of embeddings, which like products have the dtype of activations."""

    def dtype(self, dtype: torch.dtype, cast_dtype: torch.dtype | None = None) -> torch.dtype:
        """Its dtype in a model of `dtype`.

        `cast_dtype` is another one for what is only used after a cast to the dtype of activations:
        the matrices of products, and embeddings. In that dtype they compute the same, to the bit.
        """
        if cast_dtype is not None and (self.quantizes or self.embeds):
            return cast_dtype
        return torch.promote_types(dtype, torch.float32) if self.keep_float32 else dtype


class DeclaredModule(nn.Module):
    """A module that declares its parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, ParameterSpec] = {}
        """Declarations of its own parameters and buffers, by their names in this module."""

    def declare(
        self,
        name: str,
        shape: Sequence[int],
        *,
        init: InitialValue,
        decays: bool,
        keep_float32: bool = False,
        quantizes: bool = False,
        embeds: bool = False,
    ) -> None:
        """Make a parameter with uninitialised values."""
        self.specs[name] = ParameterSpec(
            init=init,
            decays=decays,
            keep_float32=keep_float32,
            quantizes=quantizes,
            embeds=embeds,
        )
        self.register_parameter(name, nn.Parameter(torch.empty(*shape)))

    def declare_buffer(
        self, name: str, shape: Sequence[int], *, init: InitialValue, keep_float32: bool = False
    ) -> None:
        """Make a buffer with uninitialised values: saved with the model, but not trained."""
        self.specs[name] = ParameterSpec(init=init, decays=False, keep_float32=keep_float32)
        self.register_buffer(name, torch.empty(*shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001
        """PyTorch calls this for every conversion (`.to`, `.half`, `.cuda`, ...)."""
        wide = [tensor for name in self._kept_float32() for tensor in _with_gradient(self, name)]

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if converted.dtype == tensor.dtype or all(tensor is not kept for kept in wide):
                return converted
            return tensor.to(converted.device, torch.promote_types(converted.dtype, torch.float32))

        return super()._apply(convert if wide else fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # With assign=True the given tensors become the module's own, and keep their dtype.
        for name in self._kept_float32():
            given = state_dict.get(prefix + name)
            if given is not None and (wide := _at_least_float32(given.dtype)) != given.dtype:
                state_dict[prefix + name] = given.detach().to(wide)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _kept_float32(self) -> list[str]:
        return [name for name, spec in self.specs.items() if spec.keep_float32]


def parameter_specs(model: nn.Module) -> dict[str, ParameterSpec]:
    """All declarations of a model's modules, by the parameters' names in the model."""
    return {
        f"{prefix}.{name}" if prefix else name: spec
        for prefix, module in model.named_modules()
        if isinstance(module, DeclaredModule)
        for name, spec in module.specs.items()
    }


def use_weight_format(model: nn.Module, weights: str | Mapping[str, str]) -> None:
    """Replace the parameters that may be quantized by uninitialised weights in a number format.

    `weights` is the format of all of them, or formats by the names of parameters, of which those
    without one stay plain. Raises ConfigError for what no format can express.
    """
    found = quantizable_names(model)
    formats = dict.fromkeys(found, weights) if isinstance(weights, str) else weights
    for name in formats:
        if name not in found:
            raise ConfigError(
                f"{name!r} is no matrix that may have a number format; those of products are: "
                f"{', '.join(found[:3])} and others"
            )
    for name, wanted in formats.items():
        if wanted not in FORMATS:
            raise ConfigError(
                f"is {wanted!r}; the number formats are {', '.join(FORMATS)}", field="weights"
            )
        prefix, _, last = name.rpartition(".")
        module = model.get_submodule(prefix)
        shape = getattr(module, last).shape
        try:
            weight = FORMATS[wanted].empty(shape)
        except OperandError as error:
            raise ConfigError(f"{name!r} of shape {tuple(shape)} cannot be {error}") from error
        delattr(module, last)
        setattr(module, last, weight)


def quantizable_names(model: nn.Module) -> list[str]:
    """The names of the parameters that may be quantized, also where they are."""
    return [name for name, spec in parameter_specs(model).items() if spec.quantizes]


def weight_formats(model: nn.Module) -> dict[str, str]:
    """The number formats of a model's quantized weights, by the names of their parameters."""
    return {n: m.format for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


def weight_format(model: nn.Module) -> str | None:
    """The number format of a model's weights, "mixed" for several; None if they are plain."""
    return name_of_formats(weight_formats(model).values())


def name_of_formats(formats: Iterable[str]) -> str | None:
    """One name for number formats: "mixed" for several, None for none."""
    names = set(formats)
    return None if not names else names.pop() if len(names) == 1 else "mixed"


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """The tensors of `state_dict`, detached; a quantized weight is one entry, not several."""
    quantized = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = name.rpartition(".")[0]
        if owner not in quantized:
            yield name, tensor.detach()
        elif tensor is next(quantized[owner].buffers()):
            yield owner, quantized[owner]


def _with_gradient(module: nn.Module, name: str) -> list[Tensor]:
    tensor = getattr(module, name)
    return [tensor] if tensor.grad is None else [tensor, tensor.grad]


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
