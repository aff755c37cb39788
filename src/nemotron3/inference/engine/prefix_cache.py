"""The prefix cache: states of earlier prompts, looked up by their tokens.

A hybrid model cannot continue from keys and values alone: the states of Mamba layers exist only at
the lengths at which they were copied. The cache therefore contains snapshots of all layers at
chosen lengths: the ends of messages, every few hundred tokens, the end of an answer. A snapshot is
looked up by a running hash of the tokens before it, and the tokens themselves are compared. Pages
of keys are shared, so a snapshot takes the memory of the states, some megabytes. The least recently
used snapshots are evicted when the budget is exceeded or pages are needed.

The hash includes the version of the weights, so states of other weights are never found.
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
"""Bytes of a token in the hash."""

_Key = tuple[int, bytes]
"""Length of a prefix, and its hash."""


class PrefixCache:
    """Snapshots by their tokens, least recently used first, of at most `max_bytes`."""

    def __init__(self, cache: HybridCache, *, max_bytes: int) -> None:
        self._cache = cache
        self._max_bytes = max_bytes
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        """Number of entries of each length: prefixes of other lengths are not hashed."""
        self._bytes = 0
        self.version = 0
        """Version of the weights; `clear` advances it."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Memory of the snapshots."""
        return self._bytes

    def match(self, tokens: Sequence[int]) -> Snapshot | None:
        """The snapshot of the longest cached prefix that is shorter than `tokens`, if any."""
        packed = _packed(tokens[:-1])
        for key in reversed(list(self._keys(packed))):
            entry = self._entries.get(key)
            if entry is not None and packed.startswith(entry.tokens):
                self._entries.move_to_end(key)
                return entry.snapshot
        return None

    def insert(self, tokens: Sequence[int], slot: int) -> None:
        """Cache a snapshot of a slot whose state was computed from these tokens."""
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
        """Drop the least recently used entry; returns whether there was one."""
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
        """Drop all entries, because the weights have changed."""
        while self.evict():
            pass
        self.version += 1

    def _keys(self, packed: bytes) -> Iterator[_Key]:
        """The keys of every prefix that has the length of an entry, from short to long."""
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
    """Tokens as bytes, which are hashed and compared in one call each."""
    return array(_TYPE, tokens).tobytes()
