"""Parameters with their own learning rate or weight decay, and frozen parameters.

A run defines groups by patterns of parameter names. Parameters in no group follow the optimizer's
configuration.

    ParameterGroupConfig(name="router", parameters=("*.gate.weight",), is_frozen=True)
    ParameterGroupConfig(name="mtp", parameters=("mtp.*",), lr_scale=0.1)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from nemotron3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParameterGroupConfig:
    """Some parameters, and how they are trained."""

    name: str
    """What the group is called in messages and in the optimizer."""
    parameters: tuple[str, ...]
    """Patterns of names, such as `mtp.*`: `*` is any text, `?` a character, `[ab]` one of a set."""
    lr_scale: float = 1.0
    """Factor of the learning rate."""
    weight_decay: float | None = None
    """Decay of the group's matrices; null takes the optimizer's."""
    is_frozen: bool = False
    """Whether the group keeps its values: it has no gradients and no optimizer state."""

    def __post_init__(self) -> None:
        if not self.name or not self.parameters:
            raise ConfigError(
                f"parameter group {self.name!r} has the patterns {self.parameters}; it needs a "
                "name and at least one pattern"
            )
        if not (self.lr_scale > 0.0 and math.isfinite(self.lr_scale)):
            raise ConfigError(
                f"lr_scale of parameter group {self.name!r} is {self.lr_scale}; it must be "
                "positive. To keep values as they are, set is_frozen"
            )
        if self.weight_decay is not None and not self.weight_decay >= 0.0:
            raise ConfigError(
                f"weight_decay of parameter group {self.name!r} is {self.weight_decay}; it must "
                "be 0 or more, or null for the optimizer's"
            )
        if self.is_frozen and (self.lr_scale != 1.0 or self.weight_decay is not None):
            raise ConfigError(
                f"parameter group {self.name!r} is frozen and has lr_scale {self.lr_scale} and "
                f"weight_decay {self.weight_decay}, which would do nothing; leave them out"
            )


def group_of_parameters(
    model: nn.Module, groups: Sequence[ParameterGroupConfig]
) -> dict[str, ParameterGroupConfig]:
    """The group of each parameter that is in one, by the parameter's name.

    Raises ConfigError for a pattern that matches no parameter, a parameter that two groups match,
    and two groups of one name.
    """
    names = [name for name, _ in model.named_parameters()]
    found: dict[str, ParameterGroupConfig] = {}
    for index, group in enumerate(groups):
        if any(group.name == other.name for other in groups[:index]):
            raise ConfigError(f"two parameter groups are called {group.name!r}; rename one")
        for pattern in group.parameters:
            fitting = [name for name in names if fnmatchcase(name, pattern)]
            if not fitting:
                raise ConfigError(
                    f"no parameter fits {pattern!r} of parameter group {group.name!r}; names are "
                    f"such as {names[0]!r}"
                )
            for name in fitting:
                if found.setdefault(name, group) is not group:
                    raise ConfigError(
                        f"parameter {name!r} is in the groups {found[name].name!r} and "
                        f"{group.name!r}; let one of them leave it out"
                    )
    return found


def freeze_parameters(model: nn.Module, groups: Sequence[ParameterGroupConfig]) -> None:
    """Set `requires_grad` to False for every parameter of a frozen group."""
    members = group_of_parameters(model, groups)
    for name, parameter in model.named_parameters():
        if name in members and members[name].is_frozen:
            parameter.requires_grad = False


def freeze_unread_parameters(model: nn.Module, *, mtp_depths: int) -> None:
    """Freeze what a loss over so many MTP depths gives no gradient: the MTP block, without any.

    The optimizer keeps no moments for it then.
    """
    for name, parameter in model.named_parameters():
        if not is_read(name, mtp_depths=mtp_depths):
            parameter.requires_grad = False


def is_read(name: str, *, mtp_depths: int) -> bool:
    """Whether a loss over so many MTP depths reads the parameter of this name."""
    return mtp_depths > 0 or not name.startswith("mtp.")
