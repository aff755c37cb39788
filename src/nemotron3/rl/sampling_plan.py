"""Which tasks each update trains on: all environments at once, in fixed proportions.

The reports keep the proportion of every environment in every batch (white paper, section 2.6). Task
numbers are counted up, so a step's tasks follow from the step alone and a run resumes exactly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nemotron3.environments.environment import Environment
from nemotron3.environments.rows import Row
from nemotron3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """An environment of a run."""

    name: str
    """A built-in one, a Python file with one, or ROWS@URL."""
    weight: float = 1.0
    """Its share of every batch, relative to the others."""
    difficulty: float | None = None
    """From 0 to 1; null for the environment's own."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"the weight of environment {self.name} is {self.weight}; it must be above 0, and "
                "finite"
            )


def quotas(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers in the proportion of `weights` that sum to `total`, at least 1 each.

    Largest remainders decide. Raises ConfigError where there are more names than numbers.
    """
    if total < len(weights):
        raise ConfigError(
            f"a batch has {total} prompts and there are {len(weights)} environments; raise "
            "--training.batch-size, or lower --group-size"
        )
    spare = total - len(weights)
    whole = sum(weights.values())
    shares = {name: spare * weight / whole for name, weight in weights.items()}
    found = {name: 1 + int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: int(shares[name]) - shares[name])
    for name in by_remainder[: total - sum(found.values())]:
        found[name] += 1
    return found


class TaskPlan(Protocol):
    """Which tasks an update trains on."""

    @property
    def quotas(self) -> Mapping[str, int]:
        """Prompts of every update, by environment."""
        ...

    def tasks(self, step: int, *, round_: int = 0, missing: Mapping[str, int]) -> Sequence[Row]:
        """Tasks of an update's round: so many of each environment as are `missing`."""
        ...


class SamplingPlan:
    """Tasks as they come, each once."""

    def __init__(
        self,
        environments: Mapping[str, Environment],
        weights: Mapping[str, float],
        *,
        prompts: int,
        rounds: int,
        seed: int,
    ) -> None:
        """`prompts` tasks an update, and as many again in each further one of its `rounds`."""
        self._environments, self._seed, self._rounds = environments, seed, rounds
        self.quotas: Mapping[str, int] = quotas(weights, prompts)

    def tasks(self, step: int, *, round_: int = 0, missing: Mapping[str, int]) -> Sequence[Row]:
        """Tasks of an update's round: so many of each environment as are `missing`."""
        rows: list[Row] = []
        for name, count in missing.items():
            assert count <= self.quotas[name]
            first = (step * self._rounds + round_) * self.quotas[name]
            environment = self._environments[name]
            rows += [
                environment.task(first + number, split="train", seed=self._seed)
                for number in range(count)
            ]
        return rows
