"""Rollouts ahead of the trainer in a run: the generator, its share of the processors, its losses.

Rollouts that were played and not trained on are lost when a run is interrupted: it goes on from its
last checkpoint and plays them again with other weights. The run's folder keeps how many were played
for each update, `buffer.jsonl`, so that the lost ones are counted.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from nemotron3.models.lora import with_own_changes
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.observe.json_lines import append_lines, read_lines
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_engine import own_engine
from nemotron3.recipes.rl_engines import ProcessEngines
from nemotron3.recipes.rl_player import Engines, RLPlayer, RunTasks
from nemotron3.recipes.run_folder import RunFolder
from nemotron3.rl.generator import Player, RolloutGenerator
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import OnEnded
from nemotron3.rl.weight_sync import PublishedWeights

_BUFFER_FILE = "buffer.jsonl"


class RolloutsAhead:
    """Plays a run's tasks while it trains; a context in which the engines live."""

    def __init__(self, run: RLRun, folder: RunFolder[RLRun]) -> None:
        """Raises ConfigError for tasks that cannot be played."""
        self.tasks = RunTasks(run, folder=folder.path)
        self._run, self._config, self._folder = run, run.asynchronous, folder
        self._threads = self._threads_before = torch.get_num_threads()
        self._processes: ProcessEngines | None = None  # until the generator has them
        self._engines: Engines | None = None  # of the newest player
        self._model: LanguageModel | None = None  # that whose weights are published
        self._generator: RolloutGenerator | None = None
        self._dropped = 0

    def __enter__(self) -> Self:
        self._threads = self._threads_before = torch.get_num_threads()
        if self._run.engines.num_processes:
            self._processes = self._start_processes()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._generator is not None:
            self._generator.close()
            self._generator = None
        if self._processes is not None:
            self._processes.close()
        torch.set_num_threads(self._threads_before)

    def publish(
        self, model: LanguageModel, version: int, *, names: Collection[str] | None = None
    ) -> None:
        """Offer the weights after so many updates; the first ones begin the play.

        `names` are the tensors that training may change, as those of `PublishedWeights`.
        """
        if self._generator is None:
            self._model = model
            self._generator = self._begin(PublishedWeights(model, names), version)
        self._generator.publish(model, version)

    def take(self, step: int, *, say: Callable[[str], None]) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates, checked."""
        assert self._generator is not None, "weights are published first"
        return self._generator.take(step, say=say)

    def look(
        self, num_tasks: int, *, when: str, say: Callable[[str], None], on_ended: OnEnded
    ) -> list[RolloutRecord]:
        """A rollout of each of so many held-out tasks of every environment, by the newest weights.

        They are played between the rollouts of two updates, which is when both sides would wait.
        """
        assert self._generator is not None, "weights are published first"
        return self._generator.look(num_tasks, when=when, say=say, on_ended=on_ended)

    def share_processors(self, *_: object) -> None:
        """Give the calling thread, the trainer's, the processors that the engine does not use."""
        if self._generator is None:
            return
        threads = self._generator.trainer_threads()
        if threads != self._threads:
            self._threads = threads
            torch.set_num_threads(threads)

    @property
    def backends(self) -> Mapping[str, str]:
        """What operations of the engines ran on."""
        return {} if self._engines is None else self._engines.backends

    def metrics(self) -> dict[str, float]:
        """Waiting, restarts, and the rollouts of this run that interruptions have lost."""
        assert self._generator is not None, "rollouts are taken first"
        return self._generator.metrics() | {"async/dropped": float(self._dropped)}

    def _begin(self, weights: PublishedWeights, first: int) -> RolloutGenerator:
        file = self._folder.path / _BUFFER_FILE
        self._dropped = dropped_rollouts(file, first)
        return RolloutGenerator(
            self._player,
            weights,
            self._config,
            first=first,
            last=self._run.training.steps,
            threads=self._threads_before,
            max_restarts=self._run.engines.max_restarts,
            on_played=partial(_note_played, file),
        )

    def _player(self, on_step: Callable[[], None], say: Callable[[str], None]) -> Player:
        run, tasks, device = self._run, self.tasks, self._folder.device
        if run.engines.num_processes:
            engines, self._processes = self._processes or self._start_processes(), None
            engines.on_step = on_step
        else:
            model = None
            if run.lora is not None:  # what does not change is in memory once
                assert self._model is not None, "weights are published first"
                model = with_own_changes(self._model, run.lora)
            engines = own_engine(
                run, tasks.environments, model=model, device=device, on_step=on_step
            )
        self._engines = engines
        return RLPlayer(tasks, engines, say=say)

    def _start_processes(self) -> ProcessEngines:
        threads = self._threads_before
        return ProcessEngines(self._run, device=self._folder.device, threads=threads)


def dropped_rollouts(file: Path, first: int) -> int:
    """Rollouts that a run has played in vain, where it goes on from update `first`.

    Those of updates from `first` on, and those of earlier updates that were played again later.
    """
    played = list(read_lines(file))
    used = {each["update"]: each["rollouts"] for each in played if each["update"] < first}
    return sum(each["rollouts"] for each in played) - sum(used.values())


def _note_played(file: Path, step: int, played: UpdateRollouts) -> None:
    append_lines(file, [{"update": step, "rollouts": len(played.played)}])
