"""Data-parallel rollout engines, each in a process of its own.

Weights are copied once, into memory that all processes share, and every engine takes them up
between two of its steps; the memory is written again when all have.

A process that dies, or whose engine fails, is replaced by a new one. That takes up the newest
weights and plays the whole share of its predecessor, of which nothing has arrived: a share's
rollouts come in one message. The other engines play on.
"""

import logging
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import cast

import torch

from nemotron3.environments.rows import Row
from nemotron3.errors import DataError, Nemotron3Error
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_process import EngineProcess
from nemotron3.rl.data_parallel import Share, shares
from nemotron3.rl.rollouts import OnEnded, Rollout
from nemotron3.rl.weight_sync import PublishedWeights, SharedWeights

_log = logging.getLogger(__name__)

_POLL_S = 0.005
"""How often `on_step` is called while the engines play."""


class ProcessEngines:
    """`run.engines.num_processes` engines that share the tasks of every play."""

    def __init__(self, run: RLRun, *, device: torch.device, threads: int) -> None:
        """Start all of them; they share `threads`."""
        self.on_step: Callable[[], None] = lambda: None
        """Called while they play; it may `install` weights, or raise to end the play."""
        self.num_restarts = 0
        """Engines that failed and were replaced."""
        self._run, self._device = run, device
        self._threads, self._running_failures = threads, 0
        self._shared: SharedWeights | None = None
        self._engines: list[EngineProcess] = []
        try:
            for place in range(run.engines.num_processes):
                self._engines.append(self._start(place))
        except BaseException:
            self.close()
            raise

    def play(
        self,
        rows: Sequence[Row],
        *,
        group_size: int = 1,
        seed: int = 0,
        effort_fraction: float = 0.0,
        on_ended: OnEnded = lambda _: None,
    ) -> list[Rollout]:
        """`group_size` rollouts of each task, in the order of the tasks.

        Raises DataError where engines fail again and again, with the last cause.
        """
        for engine, places in zip(self._engines, shares(rows, len(self._engines)), strict=True):
            if places:
                engine.play(
                    Share(
                        rows=[rows[place] for place in places],
                        places=places,
                        group_size=group_size,
                        seed=seed,
                        effort_fraction=effort_fraction,
                    )
                )

        def on_step() -> None:
            self.on_step()
            on_ended(sum(engine.num_ended for engine in self._engines))

        self._receive_until(lambda engine: engine.share is None, on_step=on_step)
        self._running_failures = 0
        played = [rollout for engine in self._engines for rollout in engine.played or ()]
        for engine in self._engines:
            engine.played, engine.num_ended = None, 0
        return sorted(played, key=lambda rollout: rollout.group)

    def install(self, weights: PublishedWeights, *, running: RunningRequests) -> int:
        """Have all engines take up the newest weights; returns their version."""
        self._await_installed()  # what they may be reading is not to change
        if self._shared is None:
            self._shared = SharedWeights(weights.tensors)
            for engine in self._engines:
                engine.share_memory(self._shared)
        version = self._shared.copy(weights)
        for engine in self._engines:
            engine.install(version, running)
        self._await_installed()
        return version

    def use_threads(self, count: int) -> None:
        """Have them compute with so many threads, all together, and one each at least."""
        self._threads = count
        for place, engine in enumerate(self._engines):
            engine.use_threads(self._threads_of(place))

    @property
    def backends(self) -> dict[str, str]:
        """What operations ran on, as `recorded_backends` has it."""
        return {name: on for engine in self._engines for name, on in engine.backends.items()}

    def close(self) -> None:
        """End the processes."""
        for engine in self._engines:
            engine.close()

    def _start(self, place: int) -> EngineProcess:
        engine = EngineProcess(self._run, device=self._device, place=place)
        engine.use_threads(self._threads_of(place))
        return engine

    def _threads_of(self, place: int) -> int:
        each, more = divmod(self._threads, self._run.engines.num_processes)
        return max(1, each + (place < more))

    def _await_installed(self) -> None:
        self._receive_until(lambda engine: not engine.is_installing)

    def _receive_until(
        self,
        is_done: Callable[[EngineProcess], bool],
        *,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Take in messages until all engines are done; those that fail are replaced."""
        while True:
            on_step()  # it may take messages in, so only then it is clear who is to be heard
            waiting = {each.socket: each for each in self._engines if not is_done(each)}
            if not waiting:
                return
            for socket in wait(list(waiting), timeout=_POLL_S):
                self._receive(waiting[cast(Connection, socket)])

    def _receive(self, engine: EngineProcess) -> None:
        try:
            engine.receive()
        except Nemotron3Error:
            raise
        except Exception as error:  # noqa: BLE001 - whatever failed there, a new one may not
            self._replace(engine, error)

    def _replace(self, failed: EngineProcess, error: Exception) -> None:
        failed.close()
        self._running_failures += 1
        cause = f"{type(error).__name__}: {error}"
        _log.warning("%s failed: %s", failed.process.name, cause)
        if self._running_failures > self._run.engines.max_restarts:
            raise DataError(
                f"engines failed {self._running_failures} times in one play, at last with {cause}; "
                "the same command goes on from the last checkpoint"
            ) from error
        self.num_restarts += 1
        place = self._engines.index(failed)
        self._engines[place] = engine = self._start(place)
        if self._shared is not None:
            engine.share_memory(self._shared)
            engine.install(self._shared.version, "recompute")
        engine.played, engine.num_ended = failed.played, failed.num_ended
        if failed.share is not None:
            engine.play(failed.share)
