"""What a LoRA adapter changes, and by how much."""

import math
from dataclasses import dataclass

from nemotron3.errors import ConfigError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """An adapter: low-rank changes of some products, with everything else frozen.

    Beside quantized weights (a directory by `nemotron3 quantize`, or a published one) it is QLoRA.
    """

    rank: int = 16
    """Rank of each change; of stacked experts, that of each expert."""
    alpha: float = 32.0
    """The change is B A times alpha / rank."""
    targets: tuple[str, ...] = (ALL_LINEAR,)
    """Names of products, or their ends: `in_proj`, `experts.up_proj`, `layers.0.mixer.q_proj`; `*`
    is anything. `all-linear` is every product of the layers except Mamba's `out_proj`, which PEFT
    refuses to load for this family; name it beside to train it."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"is {self.rank}; it must be 1 or more", field="rank")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ConfigError(
                f"is {self.alpha}; it must be positive, for example twice the rank", field="alpha"
            )
        if not self.targets or not all(self.targets):
            raise ConfigError(
                f"are {self.targets}; name products, or {ALL_LINEAR} for those of all layers",
                field="targets",
            )

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / self.rank
