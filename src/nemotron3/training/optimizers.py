"""Optimizers: weight decay and learning rate of each parameter, and state that is saved by name.

Each module declares which of its parameters have weight decay (models/parameter.py): matrices do.
Norm weights, biases and the state-space parameters do not, because shrinking them changes scales
and dynamics and does not regularise.

PyTorch numbers its optimizer state in the order of the parameters, so a module that is added in
front silently assigns every moment to a wrong parameter. Here the state is a flat dict by parameter
name (`exp_avg.backbone.layers.0.mixer.in_proj.weight`), which `CheckpointStore` saves directly and
whose names must match exactly on loading.

Trainable parameters are float32: they are the master weights. `models/precision.py` sets the dtype
of products.

    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3))
    set_learning_rate(optimizer, schedule.learning_rate(step, peak=config.lr))
    norm = clip_gradients(model.parameters(), config.clip_grad_norm)
    optimizer.step()
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.lora import is_adapted
from nemotron3.models.parameter import parameter_specs, weight_format
from nemotron3.runtime.devices import FUSED_OPTIMIZER_DEVICES
from nemotron3.training.parameter_groups import ParameterGroupConfig, group_of_parameters


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW with decoupled weight decay; the defaults are those of the Nemotron 3 reports."""

    kind: Literal["adamw"] = "adamw"
    lr: float
    """Peak learning rate; the schedule scales it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices; each step subtracts the learning rate times this share of the weight."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of the whole gradient; null leaves it as it is."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.clip_grad_norm)
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"are {self.betas}; both must be at least 0 and below 1", field="betas"
            )
        if not self.eps > 0.0:
            raise ConfigError(f"is {self.eps}; it must be positive", field="eps")


@dataclass(frozen=True, kw_only=True)
class SGDConfig:
    """Gradient descent with momentum: one state tensor for each parameter, or none."""

    kind: Literal["sgd"] = "sgd"
    lr: float
    """Peak learning rate; the schedule scales it."""
    momentum: float = 0.9
    """Decay rate of the running sum of gradients; 0 keeps none."""
    weight_decay: float = 0.0
    """Multiple of each matrix that is added to its gradient."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of the whole gradient; null leaves it as it is."""

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, self.clip_grad_norm)
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(
                f"is {self.momentum}; it must be at least 0 and below 1", field="momentum"
            )


OptimizerConfig: TypeAlias = AdamWConfig | SGDConfig


def _check(lr: float, weight_decay: float, clip_grad_norm: float | None) -> None:
    if not (lr > 0.0 and math.isfinite(lr)):
        raise ConfigError(f"is {lr}; it must be positive, for example 1e-3", field="lr")
    if not weight_decay >= 0.0:
        raise ConfigError(f"is {weight_decay}; it must be 0 or more", field="weight_decay")
    if clip_grad_norm is not None and not clip_grad_norm > 0.0:
        raise ConfigError(
            f"is {clip_grad_norm}; it must be positive, or null for none",
            field="clip_grad_norm",
        )


def parameter_groups(
    model: nn.Module, weight_decay: float, groups: Sequence[ParameterGroupConfig] = ()
) -> list[dict[str, Any]]:
    """The optimizer's parameter groups: every trainable parameter in one group, tied ones once.

    Each of `groups`, and the set of parameters in none of them, gives two groups: with weight decay
    and without. Raises ConfigError for a parameter that its module does not declare.
    """
    members, specs = group_of_parameters(model, groups), parameter_specs(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, _ in trainable:
        if name not in specs:
            raise ConfigError(
                f"nobody says whether weight decay applies to parameter {name!r}; make it by "
                "DeclaredModule.declare, or set its requires_grad to False"
            )
    built: list[dict[str, Any]] = []
    for group in (None, *groups):
        rate = weight_decay if group is None or group.weight_decay is None else group.weight_decay
        own = [(name, p) for name, p in trainable if members.get(name) is group]
        for decays in (True, False):
            parameters = [p for name, p in own if specs[name].decays is decays]
            if parameters:
                built.append(
                    {
                        "params": parameters,
                        "weight_decay": rate if decays else 0.0,
                        "lr_scale": 1.0 if group is None else group.lr_scale,
                    }
                )
    return built


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, groups: Sequence[ParameterGroupConfig] = ()
) -> torch.optim.Optimizer:
    """The optimizer of the model's trainable parameters, fused where PyTorch supports it."""
    if (weights := weight_format(model)) is not None and not is_adapted(model):
        raise ConfigError(
            f"the model's matrices are kept in {weights}, which has no gradients; train the plain "
            "model, or what models.precision.convert_weights(model, None) makes of this one"
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"trainable parameter {name!r} is {parameter.dtype}; the optimizer updates fp32 "
                "master weights, so build the model in float32 and set its precision separately"
            )
    built = parameter_groups(model, config.weight_decay, groups)
    if not built:
        raise ConfigError("the model has no trainable parameter; set requires_grad on some")
    devices = {parameter.device.type for group in built for parameter in group["params"]}
    fused = devices <= FUSED_OPTIMIZER_DEVICES
    match config:
        case AdamWConfig(lr=lr, betas=betas, eps=eps):
            return torch.optim.AdamW(built, lr=lr, betas=betas, eps=eps, fused=fused)
        case SGDConfig(lr=lr, momentum=momentum):
            return torch.optim.SGD(built, lr=lr, momentum=momentum, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next update: `lr` times the scale of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients down to `max_norm` and return their norm before scaling.

    If the norm is not finite, the gradients are unusable: the caller must check it before the
    update. For sharded gradients it is the norm over all shards.
    """
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)
    whole = getattr(norm, "full_tensor", None)  # of DTensor, whose import takes seconds
    return norm if whole is None else whole()


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as a flat dict by parameter name, for `CheckpointStore`.

    A parameter that was never updated is saved with its initial state, so the dict always has the
    same names.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _optimized(optimizer, model).items():
        initial = _initial_state(optimizer, parameter)
        state = optimizer.state.get(parameter) or initial
        tensors.update({f"{key}.{name}": state[key] for key in initial})
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Restore the result of `optimizer_tensors`.

    Raises CheckpointError for a missing or extra name, and for a shape that does not fit.
    """
    parameters = _optimized(optimizer, model)
    states = {name: _initial_state(optimizer, p) for name, p in parameters.items()}
    wanted = {f"{key}.{name}": t for name, state in states.items() for key, t in state.items()}
    if difference := sorted(wanted.keys() ^ tensors.keys()):
        first = difference[0]
        raise CheckpointError(
            f"optimizer state {first!r} is {'missing' if first in wanted else 'unknown'} "
            f"({len(difference)} names differ); resume with the model that was saved"
        )
    for key, tensor in wanted.items():
        if tensors[key].shape != tensor.shape:
            raise CheckpointError(
                f"optimizer state {key!r} has shape {list(tensors[key].shape)}, expected "
                f"{list(tensor.shape)}; resume with the model that was saved"
            )
    for name, parameter in parameters.items():
        for key, tensor in states[name].items():
            tensor.copy_(tensors[f"{key}.{name}"])
        optimizer.state[parameter] = states[name]


def _initial_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state before the first update, as PyTorch's fused optimizers create it."""

    def zeros() -> Tensor:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)

    match optimizer:
        case torch.optim.AdamW():
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            return {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros()}
        case torch.optim.SGD():
            return {"momentum_buffer": zeros()} if optimizer.defaults["momentum"] else {}
        case _:
            raise AssertionError(f"no state is known of {type(optimizer).__name__}")


def _optimized(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by their names in the model."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: p for name, p in model.named_parameters() if id(p) in held}
    assert len(named) == len(held), "the optimizer was built for another model"
    return named
