"""Rollouts of a run whose engines and trainer take turns.

One engine works on the model in training: after an update it forgets what the old weights computed,
and nothing is copied. Or engines in processes of their own are given the weights before they play.
An update's rollouts follow from its step, the seed and the weights alone.
"""

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Self

import torch

from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_engine import RolloutEngine
from nemotron3.recipes.rl_engines import ProcessEngines
from nemotron3.recipes.rl_player import RunTasks
from nemotron3.recipes.run_folder import RunFolder
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import OnEnded
from nemotron3.rl.weight_sync import PublishedWeights, check_rollouts


class RolloutsByTurns:
    """Plays a run's tasks when it is asked to; a context in which the engines live."""

    def __init__(self, run: RLRun, folder: RunFolder[RLRun]) -> None:
        """Raises ConfigError for tasks that cannot be played."""
        self.tasks = RunTasks(run, folder=folder.path)
        self._run, self._device = run, folder.device
        self._version = -1
        self._engines: RolloutEngine | ProcessEngines | None = None
        self._weights: PublishedWeights | None = None

    def __enter__(self) -> Self:
        if self._run.engines.num_processes:
            threads = torch.get_num_threads()
            self._engines = ProcessEngines(self._run, device=self._device, threads=threads)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._engines is not None:
            self._engines.close()

    def publish(
        self, model: LanguageModel, version: int, *, names: Collection[str] | None = None
    ) -> None:
        """Have the engines take up the weights after so many updates.

        `names` are the tensors that training may change, as those of `PublishedWeights`.
        """
        if version == self._version:
            return
        self._version = version
        if isinstance(self._engines, ProcessEngines):
            self._weights = self._weights or PublishedWeights(model, names)
            self._weights.publish(model, version)
            self._engines.install(self._weights, running="recompute")
            return
        if self._engines is None:
            self._engines = RolloutEngine(self._run, model, self.tasks.environments)
        self._engines.renew(version)

    def take(self, step: int, *, say: Callable[[str], None]) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates, checked."""
        assert self._engines is not None, "weights are published first"
        found = self.tasks.play(self._engines, step, say=say)
        checksums = None if self._weights is None else self._weights.checksums
        check_rollouts(found.played, version=step, max_staleness=0, checksums=checksums)
        return found

    def look(
        self, num_tasks: int, *, when: str, say: Callable[[str], None], on_ended: OnEnded
    ) -> list[RolloutRecord]:
        """A rollout of each of so many held-out tasks of every environment, by these weights."""
        assert self._engines is not None, "weights are published first"
        del say
        return self.tasks.look(self._engines, num_tasks, when=when, on_ended=on_ended)

    @property
    def backends(self) -> Mapping[str, str]:
        """What operations of the engines ran on."""
        return {} if self._engines is None else self._engines.backends

    def metrics(self) -> dict[str, float]:
        """Engines replaced so far, where they are in other processes."""
        if self._weights is None or self._engines is None:
            return {}
        return {"engines/restarts": float(self._engines.num_restarts)}
