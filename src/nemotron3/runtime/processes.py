"""Processes that work for this one and are told what to do through a socket.

They are spawned, since threads of PyTorch do not outlive a fork. Ctrl-C reaches every process of a
terminal; it is for the one that the user has started, which ends the others. If that one is killed,
they end at once, whatever they do: nobody is left to take what they make.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

END_S = 5.0
"""How long a process that was told to end has for it."""


def spawn(
    target: Callable[..., None], *arguments: Any, name: str
) -> tuple[BaseProcess, Connection]:
    """Start `target(socket, *arguments)` in a process; returns it and the other end of the socket.

    The process ignores Ctrl-C from its start, and ends when this one has ended in whatever way.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(target, theirs, *arguments), name=name)
    # Blocked while Python starts there, too. The first start of a process starts the resource
    # tracker as well, which leaves the signal unblocked.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    return process, ours


def end(process: BaseProcess) -> None:
    """End a process, by force where it does not end by itself in `END_S` seconds."""
    process.terminate()
    process.join(END_S)
    if process.is_alive():
        process.kill()
        process.join()


def _work(target: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    target(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was spawned"
    parent.join()
    os._exit(1)
