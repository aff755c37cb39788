"""The number formats of the carried state.

Decoding reads and writes the whole state for every token, so its width determines the cost of large
batches and the number of sequences that fit. Computation is in float32 in all cases: narrow states
are converted when they are read and rounded when they are written.

The published format of SSM states is float16 with stochastic rounding by five rounds of Philox
(Super report, section 4.3); in vLLM `--mamba-ssm-cache-dtype float16
--enable-mamba-cache-stochastic-rounding --mamba-cache-philox-rounds 5`.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch

from nemotron3.errors import ConfigError

_MAX_ROUNDS = 16


@dataclass(frozen=True, kw_only=True)
class StatePrecision:
    """Number formats of the carried state."""

    ssm: Literal["float32", "float16", "int8"] = "float32"
    """Format of SSM states; int8 has a scale for each block of 128 along the state axis."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Rounding of narrow states. With `nearest` they drift (docs/lab-notes/state-precision.md)."""
    philox_rounds: int = 5
    """Rounds of Philox4x32 for the random bits; with fewer than 4, answers change measurably."""
    seed: int = 0
    """Seed of the random bits, which are a function of seed, layer, position and element."""
    keys: Literal["model", "bfloat16", "float8"] = "model"
    """Format of keys and values: that of the model's activations, bfloat16, or float8 (e4m3)."""
    key_scales: tuple[tuple[float, float], ...] = ()
    """Divisors of keys and values before they become float8, for each attention layer (that of the
    MTP block last): `k_scale` and `v_scale` of published checkpoints. Empty for 1."""

    def __post_init__(self) -> None:
        if not 1 <= self.philox_rounds <= _MAX_ROUNDS:
            raise ConfigError(
                f"philox_rounds is {self.philox_rounds}; it must be from 1 to {_MAX_ROUNDS}"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"the state's seed is {self.seed}; it must be from 0 to 2^32 - 1")
        if any(not 0 < scale < torch.inf for pair in self.key_scales for scale in pair):
            raise ConfigError(f"key_scales are {self.key_scales}; each must be above 0 and finite")
        idle: dict[str, str] = {}
        if not self.is_narrow:
            idle = dict.fromkeys(("rounding", "philox_rounds", "seed"), "ssm is float32")
        elif self.rounding == "nearest":
            idle = dict.fromkeys(("philox_rounds", "seed"), "rounding is nearest")
        if self.keys != "float8":
            idle["key_scales"] = f"keys is {self.keys}"
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in idle and value != field.default:
                raise ConfigError(
                    f"{field.name} is {value}, which does nothing while {idle[field.name]}; "
                    "leave it out"
                )

    @property
    def is_narrow(self) -> bool:
        """Whether SSM states are rounded."""
        return self.ssm != "float32"

    def keys_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of keys and values, in a model with activations of `dtype`."""
        kinds = {"model": dtype, "bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}
        return kinds[self.keys]
