"""The reports' curriculum: from tasks that the model solves mostly to those that it solves rarely.

Before training, each task of a pool is played several times; the share of the rewards is its pass
rate. Tasks that are always solved teach nothing and are dropped. The proportion of the environments
stays what it is in every batch. Within an environment the wanted pass rates are drawn from a
Gaussian whose mean moves from `start` to `end` over the training (Nano report, reinforcement
learning; Ultra does the same), and the task is drawn from those that lie nearest.

Pass rates grow old as the model learns. They can be measured again every so many updates.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemotron3.environments.rows import Row
from nemotron3.errors import ConfigError, DataError

_NEAREST = 8
"""Tasks that a wanted pass rate chooses from, so that the same does not come again and again."""


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """How difficulty grows."""

    pool: int = 256
    """Tasks of each environment that training chooses from."""
    samples: int = 8
    """Rollouts of each, which tell its pass rate."""
    start: float = 0.8
    """Mean of the wanted pass rates of the first update."""
    end: float = 0.3
    """Mean of those of the last."""
    deviation: float = 0.15
    """Deviation of the wanted pass rates around the mean."""
    profile_every_steps: int | None = None
    """Updates after which pass rates are measured again; null measures them once."""

    def __post_init__(self) -> None:
        for name in ("pool", "samples", "profile_every_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"is {value}; it must be 1 or more", field=f"curriculum.{name}")
        for name in ("start", "end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"is {getattr(self, name)}; a pass rate is from 0 to 1",
                    field=f"curriculum.{name}",
                )
        if not self.deviation > 0:
            raise ConfigError(
                f"is {self.deviation}; it must be above 0", field="curriculum.deviation"
            )

    def profile_step(self, step: int) -> int:
        """The update before which the pass rates that hold at `step` were measured."""
        every = self.profile_every_steps
        return 0 if every is None else step - step % every

    def mean(self, fraction: float) -> float:
        """Mean of the wanted pass rates when this fraction of the updates has been made."""
        return self.start + (self.end - self.start) * fraction


class Curriculum:
    """The tasks of every update, chosen by their pass rates; a function of step and seed alone."""

    def __init__(
        self,
        config: CurriculumConfig,
        quotas: Mapping[str, int],
        pools: Mapping[str, Sequence[Row]],
        *,
        steps: int,
        seed: int,
    ) -> None:
        """`quotas` are prompts of an update and `pools` the tasks to choose from, by environment.

        `steps` are the updates of the whole training.
        """
        self.config, self.quotas = config, quotas
        self._pools, self._steps, self._seed = pools, steps, seed
        self._by_rate: dict[str, list[tuple[float, Row]]] = {}

    def use(self, pass_rates: Mapping[str, Sequence[float]]) -> None:
        """Take up the pass rate of every task of every pool.

        Raises DataError for an environment whose tasks are all solved always.
        """
        for name, rates in pass_rates.items():
            pairs = zip(rates, self._pools[name], strict=True)
            unsolved = [pair for pair in pairs if pair[0] < 1]
            if not unsolved:
                raise DataError(
                    f"the model solves all {len(rates)} tasks of {name} always, so it learns "
                    "nothing there; raise the difficulty, or leave it out"
                )
            self._by_rate[name] = sorted(unsolved, key=lambda pair: pair[0])

    def tasks(self, step: int, *, round_: int = 0, missing: Mapping[str, int]) -> Sequence[Row]:
        """Tasks of an update's round: so many of each environment as are `missing`."""
        mean = self.config.mean(step / max(self._steps - 1, 1))
        rows: list[Row] = []
        for name, count in missing.items():
            chance = random.Random(f"curriculum {self._seed} {step} {round_} {name}")
            left = list(self._by_rate[name])
            for _ in range(count):
                left = left or list(self._by_rate[name])
                wanted = chance.gauss(mean, self.config.deviation)
                nearest = sorted(range(len(left)), key=lambda i, w=wanted: abs(left[i][0] - w))
                rows.append(left.pop(chance.choice(nearest[:_NEAREST]))[1])
        return rows
