"""A player in a process of its own, which does not share Python's lock with the trainer.

The two are joined by a socket. Weights lie in shared memory: the trainer's process copies them
there, asks the player to take them up, and waits until it has, between two steps of its engine. A
process that dies is an error of `play`, after which `RolloutGenerator` starts another one. If the
trainer dies, the socket closes and the player ends.
"""

import logging
import multiprocessing
import pickle
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nemotron3.config import from_record, to_record
from nemotron3.errors import Nemotron3Error
from nemotron3.inference.model_runner.weights import RunningRequests
from nemotron3.recipes.rl import RLRun
from nemotron3.recipes.rl_player import RLPlayer, own_player
from nemotron3.rl.groups import UpdateRollouts
from nemotron3.rl.weight_sync import PublishedWeights, SharedWeights

_log = logging.getLogger(__name__)

_POLL_S = 0.005
"""How often the trainer's side looks for new weights while it waits."""
_END_S = 5.0
"""How long a process that was told to end has for it."""


class ProcessPlayer:
    """`Player` of `RolloutGenerator` that plays in another process."""

    def __init__(
        self,
        run: RLRun,
        weights: PublishedWeights,
        *,
        device: torch.device,
        folder: Path,
        on_step: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        """Arguments as those of `own_player`; `weights` are those that `install` will be given."""
        self._on_step, self._say = on_step, say
        self._shared = SharedWeights(weights)
        self._results: dict[str, Any] = {}
        context = multiprocessing.get_context("spawn")  # threads of PyTorch do not outlive a fork
        self._socket, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(theirs, to_record(run), str(device), folder, self._shared),
            name="rollouts",
        )
        self.process.start()
        theirs.close()

    def play(self, step: int) -> UpdateRollouts:
        """The rollouts of an update; `on_step` is called while it waits."""
        _send(self._socket, "play", step)
        return self._result("played")

    def install(self, weights: PublishedWeights, *, running: RunningRequests) -> tuple[int, int]:
        """Have the process take up the newest weights; returns their version and its checksum."""
        version = self._shared.copy(weights)
        _send(self._socket, "install", (version, running))
        return self._result("installed")

    def use_threads(self, count: int) -> None:
        """Have the process compute with so many threads from the next step on."""
        _send(self._socket, "threads", count)

    def close(self) -> None:
        """End the process."""
        self._socket.close()
        self.process.terminate()
        self.process.join(_END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _result(self, wanted: str) -> Any:
        """Wait for a result of this kind. Others may come first, and are kept."""
        while wanted not in self._results:
            if not self._socket.poll(_POLL_S):
                self._on_step()
                continue
            try:
                kind, content = _receive(self._socket)
            except (EOFError, ConnectionError):
                self.process.join(_END_S)
                raise ChildProcessError(
                    f"the engine's process ended (exit code {self.process.exitcode})"
                ) from None
            if kind == "message":
                self._say(content)
            elif kind == "error":
                raise content
            else:
                self._results[kind] = content
        return self._results.pop(wanted)


class _Served:
    """The other end: a player, and what it is told."""

    def __init__(self, socket: Connection, shared: SharedWeights) -> None:
        self._socket, self._shared = socket, shared
        self.player: RLPlayer | None = None

    def say(self, message: str) -> None:
        """Pass on a message for people."""
        _send(self._socket, "message", message)

    def between_steps(self) -> None:
        """Take up new weights in the middle of answers."""
        while self._socket.poll():
            self.obey()

    def obey(self) -> None:
        """Do the next thing that the trainer's side asks for."""
        assert self.player is not None
        kind, content = _receive(self._socket)
        if kind == "play":
            _send(self._socket, "played", self.player.play(content))
        elif kind == "threads":
            self.player.use_threads(content)
        else:
            self._shared.version, running = content
            _send(self._socket, "installed", self.player.install(self._shared, running=running))


def _serve(
    socket: Connection, record: Any, device: str, folder: Path, shared: SharedWeights
) -> None:
    """What the process does, until the socket closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which ends this
    served = _Served(socket, shared)
    try:
        served.player = own_player(
            from_record(RLRun, record),
            device=torch.device(device),
            folder=folder,
            on_step=served.between_steps,
            say=served.say,
        )
        while True:
            served.obey()
    except (EOFError, ConnectionError):
        return
    except Nemotron3Error as error:
        _send(socket, "error", error)
    except Exception as error:  # noqa: BLE001 - it is raised in the trainer's process
        _log.exception("the engine's process failed")
        _send(socket, "error", RuntimeError(f"{type(error).__name__}: {error}"))


def _send(socket: Connection, kind: str, content: Any) -> None:
    """Tensors travel by value: as shared memory, each would take a file descriptor."""
    socket.send_bytes(pickle.dumps((kind, content)))


def _receive(socket: Connection) -> tuple[str, Any]:
    return pickle.loads(socket.recv_bytes())
