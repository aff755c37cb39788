"""The device and the sizes of a run, and the random numbers of its operands."""

from dataclasses import dataclass, replace

import torch
from benchmarks.gpu.clock import Clock, ToyClock
from benchmarks.models import configs
from torch import Tensor

from nemotron3.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A device with its clock, and the sizes for it."""

    device: torch.device
    clock: Clock | ToyClock
    is_toy: bool

    @classmethod
    def gpu(cls) -> "Setting":
        """Published sizes on the GPU."""
        device = torch.device("cuda")
        return cls(device=device, clock=Clock(device), is_toy=False)

    @classmethod
    def toy(cls) -> "Setting":
        """Toy sizes on the CPU, in Triton's interpreter; nothing is timed."""
        return cls(device=torch.device("cpu"), clock=ToyClock(), is_toy=True)

    def models(self) -> dict[str, ModelConfig]:
        """The models whose layers are measured."""
        if self.is_toy:
            return {"toy": replace(configs()["toy"], vocab_size=96)}
        return {name: ModelConfig.preset(name) for name in ("nano", "super")}

    @property
    def tokens(self) -> int:
        """Tokens in a layer's input."""
        return 24 if self.is_toy else 8192


class Draw:
    """Random operands on a device, the same for the same seed.

    On the meta device they have shapes but no numbers, which is enough for compiling kernels.
    """

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        is_meta = device.type == "meta"
        self._generator = None if is_meta else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normally distributed numbers, multiplied by `scale`."""
        drawn = torch.randn(*shape, device=self.device, dtype=dtype, generator=self._generator)
        return drawn if scale == 1.0 else drawn.mul_(scale)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniformly distributed numbers in float32."""
        return (
            torch.rand(*shape, device=self.device, generator=self._generator).mul_(high - low) + low
        )

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniformly distributed integers from 0 to `high` - 1."""
        return torch.randint(high, shape, device=self.device, generator=self._generator)

    def choices(self, tokens: int, experts: int, k: int) -> Tensor:
        """k different experts for each token, [token, k]."""
        return self.uniform(tokens, experts).topk(k, dim=1).indices
