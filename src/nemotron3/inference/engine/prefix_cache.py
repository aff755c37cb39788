"""States of prompts read before, found again by the tokens that led to them.

A hybrid model cannot go on from keys alone: the Mamba layers' states exist only where they were
kept. So what is cached are snapshots of everything at chosen lengths (message ends, every some
hundred tokens, the end of an answer), found by a running hash of the tokens up to there and checked
against the tokens themselves. Pages of keys are shared, so a snapshot costs the states, some
megabytes; the least recently used ones go when the budget is full or pages are wanted.

Keys are salted with the version of the weights: what another model computed is never found.
"""

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from nemotron3.models.cache.hybrid_cache import HybridCache, Snapshot


@dataclass(frozen=True)
class _Entry:
    tokens: bytes
    snapshot: Snapshot


_TYPE = "q"
_BYTES = array(_TYPE).itemsize
"""Of a token, as it is hashed."""

_Key = tuple[int, bytes]
"""How long a beginning is, and its hash."""


class PrefixCache:
    """Snapshots by their tokens, within a budget of memory."""

    def __init__(self, cache: HybridCache, *, max_bytes: int) -> None:
        self._cache = cache
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        """Of the entries: no others need be looked up."""
        self._bytes = 0
        self.version = 0
        """Of the weights; whoever changes them calls `clear`."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Memory of the kept states."""
        return self._bytes

    def match(self, tokens: Sequence[int]) -> Snapshot | None:
        """The longest kept beginning that leaves at least one token to read."""
        packed = _packed(tokens[:-1])
        for key in reversed(list(self._keys(packed))):
            entry = self._entries.get(key)
            if entry is not None and packed.startswith(entry.tokens):
                self._entries.move_to_end(key)
                return entry.snapshot
        return None

    def insert(self, tokens: Sequence[int], slot: int) -> None:
        """Keep what a slot holds, which is what these tokens led to."""
        if self._max_bytes == 0 or not tokens:
            return
        packed = _packed(tokens)
        key = len(tokens), self._begun(packed).digest()
        if key in self._entries:
            return
        snapshot = self._cache.snapshot(slot)
        self._entries[key] = _Entry(packed, snapshot)
        self._lengths[len(tokens)] += 1
        self._bytes += snapshot.nbytes
        while self._bytes > self._max_bytes and self.evict():
            pass

    def evict(self) -> bool:
        """Drop the least recently used entry; whether there was one."""
        if not self._entries:
            return False
        (length, _), entry = self._entries.popitem(last=False)
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]
        self._bytes -= entry.snapshot.nbytes
        self._cache.drop(entry.snapshot)
        return True

    def clear(self) -> None:
        """Drop everything: the weights are others now."""
        while self.evict():
            pass
        self.version += 1

    def _keys(self, packed: bytes) -> Iterator[_Key]:
        """Of every beginning that is as long as an entry, from short to long."""
        running, at = self._begun(b""), 0
        for length in sorted(self._lengths):
            end = length * _BYTES
            if end > len(packed):
                return
            running.update(packed[at:end])
            at = end
            yield length, running.copy().digest()

    def _begun(self, packed: bytes) -> blake2b:
        running = blake2b(self.version.to_bytes(8), digest_size=16)
        running.update(packed)
        return running


def _packed(tokens: Sequence[int]) -> bytes:
    """Tokens as what is hashed and compared in one go, of long prompts too."""
    return array(_TYPE, tokens).tobytes()
