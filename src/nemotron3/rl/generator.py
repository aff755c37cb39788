"""Rollouts for the next updates, while the trainer makes this one.

A generator plays in a thread of its own, with a player that has its own copy of the model: an
engine in this thread, or in another process. Update k is trained on the weights of version k, the
updates made before it. Its rollouts may begin with weights that are `max_staleness` versions older,
so the generator waits until version k - max_staleness has been published, and every token of the
rollouts has a version from there to k. That also bounds what is buffered: `max_staleness` updates
that wait, and one in the making.

    generator = RolloutGenerator(make_player, PublishedWeights(model), config, first=0, last=100)
    for step in range(100):
        generator.publish(model, version=step)
        rollouts = generator.take(step)
        ...  # the update
    generator.close()

A player that fails or dies is replaced by a new one, which plays the whole update again: what had
been played of it is dropped, so nothing is counted twice.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, Protocol, TypeVar, get_args

from torch import nn

from nemotron3.errors import ConfigError, DataError, Nemotron3Error
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.records import RolloutRecord
from nemotron3.rl.rollouts import OnEnded
from nemotron3.rl.weight_sync import PublishedWeights, check_rollouts

_log = logging.getLogger(__name__)

T = TypeVar("T")
InFlightUpdates = Literal["recompute", "keep", "off"]


@dataclass(frozen=True, kw_only=True)
class AsyncConfig:
    """How the engine runs ahead of the trainer."""

    max_staleness: int = 0
    """Updates that the weights of a token may lie behind those that it trains: 0 has engine and
    trainer take turns; 1 is that of the reports (`max_trajectory_age_steps`)."""
    in_flight_updates: InFlightUpdates = "recompute"
    """What new weights do to answers that are being sampled. They compute the states anew, or keep
    them (the reports); "off" has them wait until an update's rollouts are complete."""
    engine_threads: int | None = None
    """Processors of all engines while they and the trainer work, null for half of them; the trainer
    has the others. Whoever works while the other one waits has all."""

    def __post_init__(self) -> None:
        for name, least in (("max_staleness", 0), ("engine_threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(
                    f"is {value}; it must be {least} or more", field=f"asynchronous.{name}"
                )
        if self.in_flight_updates not in get_args(InFlightUpdates):
            raise ConfigError(
                f"is {self.in_flight_updates!r}; it must be one of "
                f"{', '.join(get_args(InFlightUpdates))}",
                field="asynchronous.in_flight_updates",
            )
        if not self.is_ahead and any(
            getattr(self, field.name) != field.default for field in fields(self)
        ):
            raise ConfigError(
                "is 0: engine and trainer take turns, and nothing else of `asynchronous` has an "
                "effect; set it to 1 or more",
                field="asynchronous.max_staleness",
            )

    @property
    def is_ahead(self) -> bool:
        """Whether the engine plays ahead of the trainer."""
        return self.max_staleness > 0

    def threads(self, every: int) -> tuple[int, int]:
        """Threads of the engine and of the trainer while both work, of so many in all."""
        engine = min(self.engine_threads or max(1, every // 2), every)
        return engine, max(1, every - engine)


class Player(Protocol):
    """Plays the tasks of updates with an engine of its own, or several."""

    @property
    def num_restarts(self) -> int:
        """Engines that it has replaced by itself."""
        ...

    def play(self, step: int) -> UpdateRollouts:
        """The rollouts of the update that follows so many updates."""
        ...

    def look(self, num_tasks: int, *, when: str, on_ended: OnEnded) -> list[RolloutRecord]:
        """A rollout of each of so many different held-out tasks of every environment."""
        ...

    def install(self, weights: PublishedWeights, *, running: RunningRequests) -> int:
        """Take up the newest weights; returns their version.

        Rollouts that are sampled with them have the engine's own checksum of them.
        """
        ...

    def use_threads(self, count: int) -> None:
        """Compute with so many threads from the next step on."""
        ...

    def close(self) -> None:
        """End what it runs."""
        ...


MakePlayer = Callable[[Callable[[], None], Callable[[str], None]], Player]
"""Makes a player. The first function is to be called between steps of its engine, where weights may
be replaced; what it raises ends the play. The second one takes messages for people."""


@dataclass(frozen=True)
class _Look:
    """Held-out tasks that the trainer waits for."""

    num_tasks: int
    when: str
    on_ended: OnEnded


class _ClosedError(Exception):
    """The generator is to end."""


class RolloutGenerator:
    """Plays the rollouts of updates `first` to `last` - 1 in order, ahead of the trainer."""

    def __init__(
        self,
        make_player: MakePlayer,
        weights: PublishedWeights,
        config: AsyncConfig,
        *,
        first: int,
        last: int,
        threads: int = 1,
        max_restarts: int = 3,
        on_played: Callable[[int, UpdateRollouts], None] = lambda *_: None,
    ) -> None:
        """`threads` are those of engine and trainer together.

        `on_played` is called with what was played for an update, before it can be taken.
        """
        assert config.is_ahead, "without staleness there is nothing to play ahead"
        self._num_replaced = 0  # players, with the engines that they had replaced
        self._max_restarts = max_restarts
        self._make_player, self._weights, self._config = make_player, weights, config
        self._first, self._last, self._on_played = first, last, on_played
        self._changed = threading.Condition()
        self._ready: dict[int, UpdateRollouts] = {}
        self._look: _Look | None = None
        self._looked: list[RolloutRecord] | None = None
        self._messages: deque[str] = deque()
        self._error: BaseException | None = None
        self._is_closing = self._is_installing = False
        self._player: Player | None = None
        self._installed = -1
        self._trainer_waited_s = self._engine_waited_s = 0.0
        self._trainer_waits, self._engine_waits = True, False
        self._every, self._threads = threads, 0  # all, and those that the player was given
        self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
        self._thread.start()

    def publish(self, model: nn.Module, version: int) -> None:
        """Offer the weights of the trainer's model, after so many updates."""
        if version <= self._weights.version:
            return
        self._weights.publish(model, version)
        with self._changed:
            self._changed.notify_all()

    def take(self, step: int, *, say: Callable[[str], None] = lambda _: None) -> UpdateRollouts:
        """The rollouts of an update, checked; waits for them. `say` hears the player's messages.

        Raises what ended the generator, and DataError for rollouts of weights that are too old or
        that are not those of the trainer.
        """
        assert self._first <= step < self._last
        start = time.perf_counter()
        found = self._result(lambda: self._ready.pop(step, None), say)
        self._trainer_waited_s = time.perf_counter() - start
        check_rollouts(
            found.played,
            version=step,
            max_staleness=self._config.max_staleness,
            checksums=self._weights.checksums,
        )
        return found

    def look(
        self,
        num_tasks: int,
        *,
        when: str,
        say: Callable[[str], None] = lambda _: None,
        on_ended: OnEnded = lambda _: None,
    ) -> list[RolloutRecord]:
        """Held-out tasks played with the newest weights, `Player.look`, between two updates.

        `on_ended` is called in the generator's thread.
        """
        assert self._weights.version >= 0, "weights are published first"
        with self._changed:
            self._look, self._looked = _Look(num_tasks, when, on_ended), None
            self._changed.notify_all()
        return self._result(lambda: self._looked, say)

    def trainer_threads(self) -> int:
        """Threads of the trainer at this moment: all of them where the engine has nothing to do."""
        return self._every if self._engine_waits else self._config.threads(self._every)[1]

    def metrics(self) -> dict[str, float]:
        """Waiting since the last update, in seconds, and engines replaced so far."""
        with self._changed:
            engine, self._engine_waited_s = self._engine_waited_s, 0.0
            player, replaced = self._player, self._num_replaced
        return {
            "async/trainer_waited_s": self._trainer_waited_s,
            "async/engine_waited_s": engine,
            "engines/restarts": float(replaced + (player.num_restarts if player else 0)),
        }

    def close(self) -> None:
        """End the play, in the middle of an answer if need be, and the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _result(self, take: Callable[[], T | None], say: Callable[[str], None]) -> T:
        """Wait until there is something to take, and pass on messages meanwhile."""
        found, self._trainer_waits = None, True
        while found is None:
            with self._changed:
                found = take()
                if found is None and self._error is not None:
                    raise self._error
                if found is None and not self._messages:
                    self._changed.wait()
            while self._messages:
                say(self._messages.popleft())
        self._trainer_waits = False
        return found

    def _work(self) -> None:
        """The generator's thread."""
        try:
            for step in range(self._first, self._last):
                self._until_published(step - self._config.max_staleness)
                played = self._played(
                    f"the rollouts of update {step + 1}", lambda player, n=step: player.play(n)
                )
                self._on_played(step, played)
                with self._changed:
                    self._ready[step] = played
                    self._changed.notify_all()
            self._until_published(math.inf)
        except _ClosedError:
            pass
        except BaseException as error:  # noqa: BLE001 - it is raised in the trainer's thread
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._end_player()

    def _until_published(self, version: float) -> None:
        """Wait for the weights of a version; held-out tasks are played meanwhile, and first."""
        while (look := self._next_look(version)) is not None:
            looked = self._played(
                look.when,
                lambda player, it=look: player.look(
                    it.num_tasks, when=it.when, on_ended=it.on_ended
                ),
            )
            with self._changed:
                self._look, self._looked = None, looked
                self._changed.notify_all()

    def _next_look(self, version: float) -> _Look | None:
        """What the trainer waits for; None where the weights of a version are published."""
        start = time.perf_counter()
        with self._changed:
            while self._weights.version < max(version, 0) and not (self._is_closing or self._look):
                self._engine_waits = True
                self._changed.wait()
            self._engine_waits = False
            self._engine_waited_s += time.perf_counter() - start
            if self._is_closing:
                raise _ClosedError
            return self._look

    def _played(self, what: str, play: Callable[[Player], T]) -> T:
        """What a player has played, after as many that failed as may be."""
        for attempt in range(self._max_restarts + 1):
            try:
                if self._player is None:
                    self._player = self._make_player(self._between_steps, self._say)
                self._share_processors()
                self._install("recompute")
                return play(self._player)
            except (Nemotron3Error, _ClosedError):
                raise
            except Exception as error:
                _log.exception("the player of %s failed", what)
                self._end_player()
                if attempt == self._max_restarts:
                    raise DataError(
                        f"{what} failed {attempt + 1} times, at last with {type(error).__name__}: "
                        f"{error}; the same command goes on from the last checkpoint"
                    ) from error
                self._num_replaced += 1
        raise AssertionError("the last attempt returns or raises")

    def _between_steps(self) -> None:
        if self._is_closing:
            raise _ClosedError
        self._share_processors()
        running = self._config.in_flight_updates
        if running != "off" and not self._is_installing:
            self._install(running)

    def _share_processors(self) -> None:
        threads = self._every if self._trainer_waits else self._config.threads(self._every)[0]
        if threads != self._threads and self._player is not None:
            self._threads = threads
            self._player.use_threads(threads)

    def _say(self, message: str) -> None:
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()

    def _install(self, running: RunningRequests) -> None:
        if self._player is None or self._weights.version <= self._installed:
            return
        self._is_installing = True  # a player may call `_between_steps` meanwhile
        try:
            self._installed = self._player.install(self._weights, running=running)
        finally:
            self._is_installing = False

    def _end_player(self) -> None:
        with self._changed:
            player, self._player = self._player, None
            self._installed, self._threads = -1, 0
            self._num_replaced += player.num_restarts if player else 0
        if player is not None:
            player.close()
