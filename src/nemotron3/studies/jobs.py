"""Cells of a study side by side, in processes that share the processors evenly.

A cell of a small model keeps one processor busy better than two: half of its time is Python. So
cells are executed by `jobs` processes, each with its share of the threads. What a cell does depends
on neither: only the rounding of products does.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from nemotron3.errors import ConfigError, Nemotron3Error
from nemotron3.recipes.run_folder import RunCallback
from nemotron3.runtime.devices import DeviceName, resolve_device
from nemotron3.runtime.processes import END_S, end, spawn
from nemotron3.runtime.processors import processors
from nemotron3.training.trainer import StepReport

_log = logging.getLogger(__name__)

R = TypeVar("R")
Execute = Callable[[str, RunCallback], R]
"""Carries out the cell of this name, and tells the callback how it goes on."""
Prepare = Callable[[], Execute[R]]
"""What a process does before its first cell; with several jobs it has to be picklable."""


def number_of_jobs(device: DeviceName, asked: int | None) -> int:
    """Cells at once: those asked for, or one on each processor, or one on a GPU."""
    if asked is not None and asked < 1:
        raise ConfigError(f"is {asked}; it must be 1 or more", field="jobs")
    if asked is not None:
        return asked
    return processors() if resolve_device(device).type == "cpu" else 1


def side_by_side(prepare: Prepare[R], jobs: int) -> list[R]:
    """What as many processes as will work at once find at the same time, such as how long a run
    takes; each is given a name of its own."""
    found = executed(
        [f"timing-{number}" for number in range(jobs)],
        prepare,
        jobs=jobs,
        begin=lambda _: None,
        callback=RunCallback(),
    )
    return [result for _, result in found]


def executed(
    names: Sequence[str],
    prepare: Prepare[R],
    *,
    jobs: int,
    begin: Callable[[str], None],
    callback: RunCallback,
) -> Iterator[tuple[str, R]]:
    """The results of all cells, each as it is finished; one job is this process itself.

    `begin` hears the name of a cell before it is executed; `callback` hears how all of them go on.
    Raises what a cell raises; the others are ended then, as on an interruption.
    """
    if jobs == 1:
        execute = prepare() if names else None
        for name in names:
            assert execute is not None
            begin(name)
            yield name, execute(name, callback)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [_Worker(prepare, threads) for _ in range(min(jobs, len(names)))]
    try:
        yield from _results(workers, deque(names), begin, callback)
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that executes one cell after another."""

    def __init__(self, prepare: Prepare[Any], threads: int) -> None:
        self.cell: str | None = None
        self._process, self.socket = spawn(_serve, prepare, threads, name="cells")

    def begin(self, cell: str) -> None:
        """Have it execute a cell."""
        self.cell = cell
        self.socket.send(cell)

    def receive(self) -> tuple[str, Any]:
        """The next thing that it says; waits for it."""
        try:
            return self.socket.recv()
        except (EOFError, ConnectionError):
            self._process.join(END_S)
            raise Nemotron3Error(
                f"the process that executed the cell {self.cell} was ended from outside (exit code "
                f"{self._process.exitcode}; -9 is most often a lack of memory, for which --jobs 1 "
                "helps); the same command goes on from where it was"
            ) from None

    def end(self) -> None:
        """End the process, in the middle of a cell if need be: the cell goes on the next time."""
        self.socket.close()
        end(self._process)


def _results(
    workers: Sequence[_Worker],
    waiting: deque[str],
    begin: Callable[[str], None],
    callback: RunCallback,
) -> Iterator[tuple[str, Any]]:
    busy: dict[Connection, _Worker] = {}

    def begin_next(worker: _Worker) -> None:
        if waiting:
            begin(waiting[0])
            worker.begin(waiting.popleft())
            busy[worker.socket] = worker

    for worker in workers:
        begin_next(worker)
    while busy:
        for ready in wait([*busy]):
            assert isinstance(ready, Connection)
            worker = busy[ready]
            kind, content = worker.receive()
            if kind == "error":
                raise content
            if kind != "result":
                getattr(callback, kind)(*content)
                continue
            del busy[ready]
            assert worker.cell is not None
            yield worker.cell, content
            begin_next(worker)


class _Reports(RunCallback):
    """Passes everything on to the process that began this one."""

    def __init__(self, socket: Connection) -> None:
        self._socket = socket

    def stage(self, message: str) -> None:
        """A part of a run begins."""
        self._socket.send(("stage", (message,)))

    def progress(self, what: str, done: int, total: int) -> None:
        """A long part has come so far."""
        self._socket.send(("progress", (what, done, total)))

    def trained(self, report: StepReport) -> None:
        """An update was made."""
        self._socket.send(("trained", (report,)))


def _serve(socket: Connection, prepare: Prepare[Any], threads: int) -> None:
    """What the process does, until the socket closes."""
    torch.set_num_threads(threads)
    try:
        reports, execute = _Reports(socket), None
        while True:
            cell = socket.recv()
            execute = execute or prepare()
            socket.send(("result", execute(cell, reports)))
    except (EOFError, ConnectionError):
        return
    except Nemotron3Error as error:
        socket.send(("error", error))
    except Exception as error:  # noqa: BLE001 - it is raised in the parent
        _log.exception("a cell failed")
        socket.send(("error", RuntimeError(f"{type(error).__name__}: {error}")))
