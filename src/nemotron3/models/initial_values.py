"""Initial values of parameters, declared where the parameters are made.

An initial value is a small record that is called with some elements of the parameter. The random
numbers of an element are a function of the parameter's name and the element's index, so a process
with a shard of a parameter computes only that shard.

    @dataclass(frozen=True)
    class Triangular:
        def __call__(self, elements: Elements, scale: InitialScale) -> Tensor:
            return scale.std * (elements.uniform() + elements.uniform(stream="second") - 1)
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor

from nemotron3.ops import counter_random


@dataclass(frozen=True)
class Elements:
    """Elements `start` to `stop` - 1 of the parameter `name`, in memory order."""

    seed: int
    name: str
    start: int
    stop: int
    device: torch.device

    def uniform(
        self, low: float = 0.0, high: float = 1.0, *, stream: str = ""
    ) -> Float32[Tensor, " element"]:
        """Uniform random numbers; each `stream` has its own."""
        drawn = counter_random.uniform(self._key(stream), self.start, self.stop, self.device)
        return drawn.mul_(high - low).add_(low)

    def normal(self, std: float, *, stream: str = "") -> Float32[Tensor, " element"]:
        """Normal random numbers around 0."""
        drawn = counter_random.normal(self._key(stream), self.start, self.stop, self.device)
        return drawn.mul_(std)

    def full(self, value: float) -> Float32[Tensor, " element"]:
        """The same value for each element."""
        return torch.full((self.stop - self.start,), value, device=self.device)

    def _key(self, stream: str) -> int:
        return counter_random.stream_key(self.seed, f"{self.name} {stream}")


class InitialScale(NamedTuple):
    """Standard deviations of a model's initial matrices."""

    std: float
    """Standard deviation of matrices."""
    residual_std: float
    """Standard deviation of matrices whose products are added to the residual stream."""


class InitialValue(Protocol):
    """Computes the initial values of some elements of a parameter."""

    def __call__(self, elements: Elements, scale: InitialScale) -> Tensor: ...


@dataclass(frozen=True)
class Normal:
    """N(0, std) with the model's own standard deviation."""

    writes_residual: bool = False
    """Whether the parameter's products are added to the residual stream."""

    def __call__(self, elements: Elements, scale: InitialScale) -> Tensor:
        return elements.normal(scale.residual_std if self.writes_residual else scale.std)


@dataclass(frozen=True)
class Uniform:
    """Uniform in [low, high)."""

    low: float
    high: float

    def __call__(self, elements: Elements, scale: InitialScale) -> Tensor:  # noqa: ARG002
        return elements.uniform(self.low, self.high)


@dataclass(frozen=True)
class Constant:
    """The same value for all elements."""

    value: float

    def __call__(self, elements: Elements, scale: InitialScale) -> Tensor:  # noqa: ARG002
        return elements.full(self.value)
