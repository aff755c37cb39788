"""The worker process that compiles grammars before the engine does.

It reads a vocabulary and then grammars from its standard input, compiles each, generates a few
tokens with it, and writes a line of JSON to its standard output: `{"error": null}`, or the error. A
grammar that overflows the stack, or exceeds the limits of memory or time, ends the process; the
parent (`grammar_checks.py`) detects that and starts another.

A grammar that passes here passes in the engine, because the stack is smaller than that of any
thread there. The process ends with its input, or by a timer while it is busy, so it does not
outlive its parent.
"""

import json
import os
import pickle
import random
import resource
import signal
import struct
import sys
import threading
import time
from typing import Any

from nemotron3.errors import ConfigError
from nemotron3.inference.structured_output.grammar_library import (
    MAX_COMPILE_S,
    GrammarLibrary,
    grammar_error,
)

MAX_MEMORY_BYTES = 2 * 2**30

_STACK_BYTES = 2**20
_GRACE_S = 1.0  # so that the parent's timeout comes first
_TRIAL_STEPS = 48
_TRIAL_S = 1.0


def main() -> None:
    """Serve until the input ends."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    vocabulary = _receive()
    if vocabulary is None:
        return
    library = GrammarLibrary(**vocabulary, encode=_Bytes(vocabulary["tokens"]))
    _answer(None)
    while (grammar := _receive()) is not None:
        signal.setitimer(signal.ITIMER_REAL, MAX_COMPILE_S + _GRACE_S)
        _answer(_verdict(library, *grammar))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _verdict(library: GrammarLibrary, kind: str, text: str) -> str | None:
    """The error of a grammar, compiled in a thread with a small stack; None if there is none."""
    # A panic of the library ends the thread without an exception.
    found: list[str | None] = [grammar_error("the compiler of grammars failed")]

    def work() -> None:
        try:
            _try_out(library.compile(kind, text))
            found[0] = None
        except ConfigError as error:
            found[0] = error.problem

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return found[0]


def _try_out(matcher: Any) -> None:
    """Generate random allowed tokens; if none is allowed, an answer will fail with that error."""
    matcher = matcher.deep_copy()
    chance = random.Random(0)
    end = time.monotonic() + _TRIAL_S
    for _ in range(_TRIAL_STEPS):
        bits = matcher.compute_bitmask()
        places = [i for i, byte in enumerate(bits) if byte]
        if not places or matcher.is_error() or time.monotonic() > end:
            return
        place = chance.choice(places)
        token = 8 * place + chance.choice([bit for bit in range(8) if bits[place] >> bit & 1])
        matcher.is_accepting()
        matcher.deep_copy()
        if not matcher.consume_token(token):
            return


class _Bytes:
    """Tokenizes text byte by byte, so that the worker needs no tokenizer."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._ids = {token[0]: i for i, token in enumerate(tokens) if len(token) == 1}

    def __call__(self, text: str) -> list[int]:
        return [self._ids[byte] for byte in text.encode() if byte in self._ids]


def _receive() -> Any:
    """The next message of the parent; None at the end of the input."""
    head = _read(4)
    size = struct.unpack(">I", head)[0] if head is not None else 0
    body = _read(size) if size else None
    return None if body is None else pickle.loads(body)


def _read(size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = os.read(0, size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _answer(error: str | None) -> None:
    sys.stdout.write(json.dumps({"error": error}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
