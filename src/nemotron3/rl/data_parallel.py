"""Data-parallel engines: replicas of one policy that share the tasks of every play.

Every engine has all weights, and each task belongs to one of them with all its rollouts, whose
rewards may be given together. Who plays what follows from the tasks alone, never from who is free
first: so a run that goes on from a checkpoint samples the same rollouts, and an engine that is
replaced plays just what its predecessor was to play. Seeds follow from a task's place among all
tasks, so they are the same for any number of engines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nemotron3.environments.rows import Row, environment_of
from nemotron3.errors import ConfigError
from nemotron3.rl.rollouts import OnEnded, Rollout


@dataclass(frozen=True, kw_only=True)
class EnginesConfig:
    """The engines that play."""

    num_processes: int = 0
    """Engines, each in a process of its own with its own copy of the weights, that share the tasks
    of every play (data parallel). 0 for one engine in the trainer's process."""
    max_restarts: int = 3
    """How often failed engines are replaced in one play."""

    def __post_init__(self) -> None:
        for name in ("num_processes", "max_restarts"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"is {getattr(self, name)}; it must be 0 or more", field=f"engines.{name}"
                )


class TaskPlayer(Protocol):
    """Plays tasks as `RolloutDriver.play` does, with one engine or several."""

    def play(
        self,
        rows: Sequence[Row],
        *,
        group_size: int = 1,
        seed: int = 0,
        effort_fraction: float = 0.0,
        on_ended: OnEnded = lambda _: None,
    ) -> list[Rollout]:
        """`group_size` rollouts of each task, in the order of the tasks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one engine plays of a list of tasks: arguments of `RolloutDriver.play`."""

    rows: Sequence[Row]
    places: Sequence[int]
    """Of `rows` in the whole list."""
    group_size: int = 1
    seed: int = 0
    effort_fraction: float = 0.0


def shares(rows: Sequence[Row], num_engines: int) -> list[list[int]]:
    """Places of the tasks that each engine plays, ascending; dealt environment by environment.

    Tasks of an environment cost about the same, so all engines have about equally much to do.
    """
    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        first.setdefault(environment_of(row), place)
    dealt = sorted(range(len(rows)), key=lambda place: first[environment_of(rows[place])])
    return [sorted(dealt[engine::num_engines]) for engine in range(num_engines)]
