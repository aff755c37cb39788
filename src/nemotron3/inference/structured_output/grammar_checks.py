"""Check in a separate process whether a grammar can be compiled safely.

A grammar whose compilation would end the engine's process only ends the worker process
(`grammar_worker.py`), which starts with the first grammar and restarts after such an end. Grammars
are checked in order of arrival, each within a few seconds; when too many wait, further ones are
refused. Results are cached by the digest of the grammar.

The worker is started by `python -m` instead of `multiprocessing`, which would run a user's script a
second time if the script has no `if __name__ == "__main__"`.
"""

import hashlib
import json
import os
import pickle
import selectors
import struct
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, TypeVar

from nemotron3.errors import BackendUnavailableError, OverloadedError
from nemotron3.inference.structured_output.grammar_library import MAX_COMPILE_S, grammar_error

T = TypeVar("T")

_START_S = 120.0
_MAX_VERDICTS = 4096
_MAX_WAITING = 32
_TIMEOUT_KEPT_S = 60.0  # then the grammar is tried again: the machine may have been busy
_WORKER = "nemotron3.inference.structured_output.grammar_worker"


class GrammarChecks:
    """Owns a worker process and the thread that sends it grammars; one object per compiler.

    `vocabulary` has the keyword arguments of `GrammarLibrary`, without `encode`.
    """

    def __init__(self, vocabulary: Mapping[str, Any]) -> None:
        self._vocabulary = vocabulary
        self._verdicts: OrderedDict[bytes, tuple[str | None, float]] = OrderedDict()
        self._lock = Lock()
        self._num_waiting = 0
        self._is_closed = False
        self._worker = _Worker()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._end = weakref.finalize(self, self._worker.end)

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Run a function in the checking thread, in order of submission.

        Raises `OverloadedError` if too many wait.
        """
        with self._lock:
            if self._is_closed:
                raise OverloadedError("the engine has been closed; start another one")
            if self._num_waiting >= _MAX_WAITING:
                raise OverloadedError(
                    f"{self._num_waiting} grammars are waiting to be compiled; try later"
                )
            self._num_waiting += 1
        future = self._executor.submit(work)
        future.add_done_callback(self._leave)
        return future

    def check(self, kind: str, text: str) -> "Future[str | None]":
        """The error of a grammar, None if it can be compiled; at once if the result is cached."""
        digest = hashlib.sha256(f"{kind}\0{text}".encode()).digest()
        known = self._known(digest)
        if known is None:
            return self.submit(partial(self._verdict, digest, kind, text))
        ready: Future[str | None] = Future()
        ready.set_result(known[0])
        return ready

    def _known(self, digest: bytes) -> tuple[str | None, float] | None:
        with self._lock:
            known = self._verdicts.get(digest)
            if known is None or known[1] < time.monotonic():
                return None
            self._verdicts.move_to_end(digest)
        return known

    def _verdict(self, digest: bytes, kind: str, text: str) -> str | None:
        # If a grammar was submitted twice, the second check finds the result of the first.
        known = self._known(digest) or self._find(kind, text)
        with self._lock:
            self._verdicts[digest] = known
            while len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        return known[0]

    def close(self) -> None:
        """End the worker; checks that wait are cancelled."""
        with self._lock:
            self._is_closed = True
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._end()

    def _leave(self, _: "Future[Any]") -> None:
        with self._lock:
            self._num_waiting -= 1

    def _find(self, kind: str, text: str) -> tuple[str | None, float]:
        for _ in range(2):  # the first worker may have been killed from outside
            self._worker.start(self._vocabulary)
            try:
                return self._worker.ask((kind, text), MAX_COMPILE_S), float("inf")
            except TimeoutError:
                why = f"its compilation takes more than {MAX_COMPILE_S:g} seconds"
                return grammar_error(why), time.monotonic() + _TIMEOUT_KEPT_S
            except EOFError:
                if self._is_closed:
                    break
        return grammar_error("it is too deep or too large to be compiled"), float("inf")


class _Worker:
    """The worker process, running or not."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()
        self._is_over = False
        self._is_asked = False

    def start(self, vocabulary: Mapping[str, Any]) -> None:
        """Start the process if it does not run."""
        with self._lock:
            if self._is_over:
                raise OverloadedError("the engine has been closed; start another one")
            if self._process is not None and self._process.poll() is None:
                return
            self._reap()
            self._process = _started()
        try:
            self.ask(vocabulary, _START_S)
        except (EOFError, TimeoutError) as error:
            raise BackendUnavailableError(
                f"the process that compiles grammars does not start; run "
                f"`{sys.executable} -m {_WORKER}` to see why"
            ) from error

    def ask(self, question: Any, timeout_s: float) -> str | None:
        """Send a grammar or the vocabulary; returns its error, None if there is none.

        Raises EOFError if the process ends, TimeoutError if it takes too long; the process is then
        killed.
        """
        with self._lock:
            process = self._process
            self._is_asked = process is not None and not self._is_over
            if process is None or self._is_over:
                raise EOFError
        is_fine = False
        try:
            answer = _exchange(process, pickle.dumps(question), timeout_s)
            is_fine = True
            return answer
        except TimeoutError:
            raise
        except OSError as error:  # the pipe is closed
            raise EOFError from error
        finally:
            with self._lock:
                self._is_asked = False
                if self._is_over or not is_fine:
                    self._reap()

    def end(self) -> None:
        """Kill the process for good; a thread within `ask` reaps it."""
        with self._lock:
            self._is_over = True
            if self._process is not None:
                self._process.kill()
            if not self._is_asked:
                self._reap()

    def _reap(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _exchange(process: "subprocess.Popen[bytes]", question: bytes, timeout_s: float) -> str | None:
    assert process.stdin is not None
    assert process.stdout is not None
    end = time.monotonic() + timeout_s
    process.stdin.write(struct.pack(">I", len(question)) + question)
    process.stdin.flush()
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, end - time.monotonic())):
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 2**16)
            if not part:
                raise EOFError
            line += part
    return json.loads(line)["error"]


def _started() -> "subprocess.Popen[bytes]":
    environment = {
        # The worker imports from the same folders, including those that a script has added.
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # Threads and arenas would use up the limited memory.
        "RAYON_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a crash is reported as the grammar's error
        env={**os.environ, **environment},
        start_new_session=True,  # only the parent gets an interrupt, and ends the worker
    )
