"""AdamW as the reports use it: which parameters decay, and state that is saved by name.

Weight decay is for matrices, and each module declares for which of its parameters
(models/parameter.py). Norm weights, biases and the state-space parameters have none: to shrink
those is to change scales and dynamics, not to regularise.

PyTorch numbers its optimizer state by the order of parameters, so that a module added in front
moves every moment to a wrong parameter without an error. Here state is a flat dict by parameter
name (`exp_avg.backbone.layers.0.mixer.in_proj.weight`), which `CheckpointStore` takes as it is and
which must match exactly on the way back.

Trainable parameters are fp32: they are the master weights. What a product runs in is the business
of `models/precision.py`.

    optimizer = build_optimizer(model, AdamWConfig(lr=1e-3))
    set_learning_rate(optimizer, schedule.learning_rate(step, peak=config.lr))
    norm = clip_gradients(model.parameters(), config.clip_grad_norm)
    optimizer.step()
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemotron3.errors import CheckpointError, ConfigError
from nemotron3.models.parameter import parameter_specs
from nemotron3.parallel.devices import FUSED_OPTIMIZER_DEVICES

_STATE_KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW with decoupled weight decay; the defaults are those of the Nemotron 3 reports."""

    kind: Literal["adamw"] = "adamw"
    lr: float
    """Peak learning rate; the schedule scales it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices per step, times the learning rate."""
    clip_grad_norm: float | None = 1.0
    """Largest norm of the whole gradient; null leaves it as it is."""

    def __post_init__(self) -> None:
        if not (self.lr > 0.0 and math.isfinite(self.lr)):
            raise ConfigError(f"lr is {self.lr}; it must be positive, for example 1e-3")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}; both must be at least 0 and below 1")
        if not self.eps > 0.0:
            raise ConfigError(f"eps is {self.eps}; it must be positive")
        if not self.weight_decay >= 0.0:
            raise ConfigError(f"weight_decay is {self.weight_decay}; it must be 0 or more")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0.0:
            raise ConfigError(
                f"clip_grad_norm is {self.clip_grad_norm}; it must be positive, or null for none"
            )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one of two groups, decayed and not; tied ones once.

    Raises ConfigError for a parameter that its module does not declare.
    """
    specs = parameter_specs(model)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in specs:
            raise ConfigError(
                f"nobody says whether weight decay applies to parameter {name!r}; make it by "
                "DeclaredModule.declare, or set its requires_grad to False"
            )
        groups[specs[name].decays].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters, fused where PyTorch has it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                f"trainable parameter {name!r} is {parameter.dtype}; the optimizer updates fp32 "
                "master weights, so build the model in float32 and set its precision separately"
            )
    groups = parameter_groups(model, config.weight_decay)
    if not groups:
        raise ConfigError("the model has no trainable parameter; set requires_grad on some")
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=devices <= FUSED_OPTIMIZER_DEVICES,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the rate of the coming update."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale the gradients down to `max_norm` and return the norm they had.

    A norm that is not finite is returned as it is, with gradients that are then useless: the caller
    looks at it before the update.
    """
    return nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as a flat dict by parameter name, for `CheckpointStore`.

    A parameter that was never updated is saved with zeros, which is the state AdamW would begin
    with; so a complete dict always has the same names.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _optimized(optimizer, model).items():
        state = optimizer.state.get(parameter) or _initial_state(parameter)
        tensors.update({f"{key}.{name}": state[key] for key in _STATE_KEYS})
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.AdamW, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` gave; a name or shape that does not fit is an error."""
    parameters = _optimized(optimizer, model)
    wanted = {f"{key}.{name}": p for name, p in parameters.items() for key in _STATE_KEYS}
    if difference := sorted(wanted.keys() ^ tensors.keys()):
        first = difference[0]
        raise CheckpointError(
            f"optimizer state {first!r} is {'missing' if first in wanted else 'unknown'} "
            f"({len(difference)} names differ); resume with the model that was saved"
        )
    for key, parameter in wanted.items():
        shape = torch.Size() if key.startswith("step.") else parameter.shape
        if tensors[key].shape != shape:
            raise CheckpointError(
                f"optimizer state {key!r} has shape {list(tensors[key].shape)}, expected "
                f"{list(shape)}; resume with the model that was saved"
            )
    for name, parameter in parameters.items():
        state = _initial_state(parameter)
        for key in _STATE_KEYS:
            state[key].copy_(tensors[f"{key}.{name}"])
        optimizer.state[parameter] = state


def _initial_state(parameter: Tensor) -> dict[str, Tensor]:
    """The state of fused AdamW before the first update."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _optimized(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer updates, by their names in the model."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: p for name, p in model.named_parameters() if id(p) in held}
    assert len(named) == len(held), "the optimizer was built for another model"
    return named
