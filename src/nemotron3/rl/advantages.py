"""Advantages of GRPO: how much better a response is than the others to the same prompt.

    A_i = clamp((R_i - b_i) / (s_i + 1e-6)),    b_i = mean of R_j over j != i

The baseline leaves out the response itself, so that it does not depend on it. Three deviations are
offered, of which the reports use the second (NeMo RL's `normalize_rewards` with
`use_leave_one_out_baseline`):

* `group`: that of all rewards of the group. A lone success among 16 gets 4.1.
* `leave_one_out`: that of the other rewards. For a lone success these are all alike, s_i is 0, and
  the advantage is R_i - b_i = 1: rare successes count a quarter of what they do by the first.
* `none`: rewards as they are.

A group whose rewards are all alike has advantages of 0: it teaches nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemotron3.errors import ConfigError, DataError

Deviation = Literal["group", "leave_one_out", "none"]
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How rewards become advantages."""

    deviation: Deviation = "group"
    """What advantages are divided by."""
    clamp: float | None = 50.0
    """Largest size of an advantage; 50 for Super, 20 for Ultra, null for none."""

    def __post_init__(self) -> None:
        if self.deviation not in ("group", "leave_one_out", "none"):
            raise ConfigError(
                f"is {self.deviation!r}; it must be group, leave_one_out or none",
                field="deviation",
            )
        if self.clamp is not None and not self.clamp > 0:
            raise ConfigError(
                f"is {self.clamp}; it must be above 0, or null for none", field="clamp"
            )


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> Tensor:
    """The advantages of one group, float64; a single response has 0."""
    if not all(math.isfinite(reward) for reward in rewards):
        raise DataError(f"rewards are {list(rewards)}; they must be finite")
    given = torch.tensor([*rewards], dtype=torch.float64)
    if len(given) < 2 or not has_variance(rewards):
        return torch.zeros_like(given)
    others = len(given) - 1
    baseline = (given.sum() - given) / others
    advantages = given - baseline
    if config.deviation == "group":
        advantages = advantages / (given.std(correction=0) + _EPSILON)
    elif config.deviation == "leave_one_out":
        deviation = _deviation_of_others(given)
        advantages = torch.where(deviation > 0, advantages / (deviation + _EPSILON), advantages)
    if config.clamp is not None:
        advantages = advantages.clamp(-config.clamp, config.clamp)
    return advantages


def has_variance(rewards: Sequence[float]) -> bool:
    """Whether a group of rewards teaches anything."""
    return len(rewards) > 1 and max(rewards) > min(rewards)


def _deviation_of_others(rewards: Tensor) -> Tensor:
    """The sample deviation of the rewards but each one's own; 0 where those are all alike."""
    deviations = torch.zeros_like(rewards)
    for i in range(len(rewards)):
        others = torch.cat([rewards[:i], rewards[i + 1 :]])
        if others.max() > others.min():
            deviations[i] = others.std()
    return deviations
