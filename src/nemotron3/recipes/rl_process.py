"""A rollout engine in a process of its own, which does not share Python's lock with the trainer.

Both ends of the socket that joins them. Weights lie in memory that all processes share. If the
trainer dies, the socket closes and the process ends, between two steps of its engine.
"""

import gc
import logging
import pickle
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from nemotron3.config import from_record, to_record
from nemotron3.errors import Nemotron3Error
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_engine import RolloutEngine, own_engine, run_environments
from nemotron3.rl.data_parallel import Share
from nemotron3.rl.rollouts import Rollout
from nemotron3.rl.weight_sync import SharedWeights
from nemotron3.runtime.processes import END_S, end, spawn

_log = logging.getLogger(__name__)

_TELL_EVERY_S = 0.2
"""How often the trainer hears how many rollouts have ended."""


class EngineProcess:
    """The trainer's end: tells the engine what to do, and hears its results.

    A process that has died is noticed by `receive`; what is sent to it meanwhile is lost.
    """

    def __init__(self, run: RLRun, *, device: torch.device, place: int) -> None:
        """Start the process; it reads the model of `run` meanwhile."""
        self.process, self.socket = spawn(
            _serve, to_record(run), str(device), name=f"engine {place}"
        )
        self.share: Share | None = None
        """What it is to play, until that has been played."""
        self.is_installing = False
        """Whether it has yet to say that it has taken up weights."""
        self.played: list[Rollout] | None = None
        """The result of the play before it is fetched."""
        self.num_ended = 0
        """Rollouts of the play that have ended so far."""
        self.backends: dict[str, str] = {}
        """What operations have run on there."""

    def play(self, share: Share) -> None:
        """Have it play; `played` is the result."""
        self.share, self.played, self.num_ended = share, None, 0
        self._send("play", share)

    def share_memory(self, weights: SharedWeights) -> None:
        """Tell it where the weights are that it is to `install`."""
        self._send_bytes(bytes(ForkingPickler.dumps(("weights", weights))))

    def install(self, version: int, running: RunningRequests) -> None:
        """Have it take up what the shared memory holds, between two steps."""
        self.is_installing = True
        self._send("install", (version, running))

    def use_threads(self, count: int) -> None:
        """Have it compute with so many threads from the next step on."""
        self._send("threads", count)

    def receive(self) -> None:
        """Take the next message in.

        Raises what failed there: ChildProcessError where the process has died, RuntimeError with
        the cause where the engine has failed, and errors of the package as they are.
        """
        try:
            kind, content = pickle.loads(self.socket.recv_bytes())
        except (EOFError, OSError):
            self.process.join(END_S)
            raise ChildProcessError(
                f"the process ended with exit code {self.process.exitcode}"
            ) from None
        if kind == "played":
            self.share, (played, self.backends) = None, content
            self.played, self.num_ended = played, len(played)
        elif kind == "ended":
            self.num_ended = content
        elif kind == "installed":
            self.is_installing = False
        else:
            raise content

    def close(self) -> None:
        """End the process."""
        self.socket.close()
        end(self.process)

    def _send(self, kind: str, content: Any) -> None:
        self._send_bytes(pickle.dumps((kind, content)))

    def _send_bytes(self, message: bytes) -> None:
        try:
            self.socket.send_bytes(message)
        except ConnectionError:
            _log.debug("%s does not listen; `receive` says why", self.process.name)


class _TrainerGoneError(Exception):
    """Nobody is at the other end."""


class _Server:
    """The engine's end."""

    def __init__(self, socket: Connection) -> None:
        self._socket = socket
        self._weights: SharedWeights | None = None
        self._told_at = 0.0
        self.engine: RolloutEngine | None = None

    def between_steps(self) -> None:
        """Take up new weights in the middle of answers."""
        while self._socket.poll():
            self.obey()

    def obey(self) -> None:
        """Do the next thing that the trainer's end asks for."""
        assert self.engine is not None
        kind, content = self._receive()
        if kind == "play":
            self._told_at = time.monotonic()
            played = self.engine.play(**vars(content), on_ended=self._tell_ended)
            self.send("played", (played, self.engine.backends))
        elif kind == "threads":
            self.engine.use_threads(content)
        elif kind == "weights":
            self._weights = content
        else:
            assert self._weights is not None
            self._weights.version, running = content
            self.send("installed", self.engine.install(self._weights, running=running))

    def _tell_ended(self, count: int) -> None:
        now = time.monotonic()
        if now - self._told_at >= _TELL_EVERY_S:
            self._told_at = now
            self.send("ended", count)

    def send(self, kind: str, content: Any) -> None:
        """Tensors travel by value: as shared memory, each would take a file descriptor."""
        try:
            self._socket.send_bytes(pickle.dumps((kind, content)))
        except ConnectionError:
            raise _TrainerGoneError from None

    def _receive(self) -> tuple[str, Any]:
        try:
            return pickle.loads(self._socket.recv_bytes())
        except (EOFError, OSError):
            raise _TrainerGoneError from None


def _serve(socket: Connection, record: Any, device: str) -> None:
    """What the process does, until the socket closes."""
    server, run = _Server(socket), from_record(RLRun, record)
    try:
        server.engine = own_engine(
            run, run_environments(run), device=torch.device(device), on_step=server.between_steps
        )
        gc.freeze()  # what lives as long as the process is not looked through again and again
        while True:
            server.obey()
    except _TrainerGoneError:
        return
    except Nemotron3Error as error:
        failure: Exception = error
    except Exception as error:  # noqa: BLE001 - it is raised in the trainer's process
        _log.exception("an engine's process failed")
        failure = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(_TrainerGoneError):
        server.send("error", failure)
