"""States of prompts read before, found again by the tokens that led to them.

A hybrid model cannot go on from keys alone: the Mamba layers' states exist only where they were
kept. So what is cached are snapshots of everything at chosen lengths (message ends, every some
hundred tokens, the end of an answer), found by a running hash of the tokens up to there and checked
against the tokens themselves. Pages of keys are shared, so a snapshot costs the states, some
megabytes; the least recently used ones go when the budget is full or pages are wanted.

Keys are salted with the version of the weights: what another model computed is never found.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nemotron3.models.cache import HybridCache, Snapshot


@dataclass(frozen=True)
class _Entry:
    tokens: tuple[int, ...]
    snapshot: Snapshot


class PrefixCache:
    """Snapshots by their tokens, within a budget of memory."""

    def __init__(self, cache: HybridCache, *, max_bytes: int) -> None:
        self._cache = cache
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[int, int], _Entry] = OrderedDict()
        self._bytes = 0
        self.version = 0
        """Of the weights; whoever changes them calls `forget`."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Memory of the kept states."""
        return self._bytes

    def find(self, tokens: Sequence[int]) -> Snapshot | None:
        """The longest kept beginning that leaves at least one token to read."""
        if not self._entries:
            return None
        found = None
        for length, key in self._keys(tokens[:-1]):
            entry = self._entries.get((length, key))
            if entry is not None and entry.tokens == tuple(tokens[:length]):
                found = (length, key)
        if found is None:
            return None
        self._entries.move_to_end(found)
        return self._entries[found].snapshot

    def keep(self, tokens: Sequence[int], slot: int) -> None:
        """Keep what a slot holds, which is what these tokens led to."""
        key = self._key(tokens)
        if self._max_bytes == 0 or key in self._entries or not tokens:
            return
        snapshot = self._cache.snapshot(slot)
        self._entries[key] = _Entry(tuple(tokens), snapshot)
        self._bytes += snapshot.nbytes
        while self._bytes > self._max_bytes and self.evict():
            pass

    def evict(self) -> bool:
        """Drop the least recently used entry; whether there was one."""
        if not self._entries:
            return False
        _, entry = self._entries.popitem(last=False)
        self._bytes -= entry.snapshot.nbytes
        self._cache.drop(entry.snapshot)
        return True

    def forget(self) -> None:
        """Drop everything: the weights are others now."""
        while self.evict():
            pass
        self.version += 1

    def _key(self, tokens: Sequence[int]) -> tuple[int, int]:
        running = self.version
        for token in tokens:
            running = hash((running, token))
        return len(tokens), running

    def _keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Length and hash of every beginning."""
        running = self.version
        for length, token in enumerate(tokens, start=1):
            running = hash((running, token))
            yield length, running
