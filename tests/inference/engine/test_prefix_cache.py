"""Cached prefixes are found by their tokens only, the longest first."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from nemotron3.inference.engine.prefix_cache import PrefixCache

TOKENS = st.lists(st.integers(0, 2), max_size=8)


@dataclass
class Kept:
    """A state of one byte that names its owner."""

    slot: int
    nbytes: int = 1


class Slots:
    """A double of the cache: it makes snapshots and records which ones are dropped."""

    def __init__(self):
        self.held = 0

    def snapshot(self, slot):
        self.held += 1
        return Kept(slot)

    def drop(self, _):
        self.held -= 1


@given(
    kept=st.lists(TOKENS, max_size=12, unique_by=tuple),
    dropped=st.integers(0, 12),
    wanted=st.lists(TOKENS, min_size=1, max_size=6),
)
def test_the_longest_kept_beginning_is_found(kept, dropped, wanted):
    slots = Slots()
    prefixes = PrefixCache(slots, max_bytes=100)
    for slot, tokens in enumerate(kept):
        prefixes.insert(tokens, slot)
    there = [slot for slot, tokens in enumerate(kept) if tokens]
    for _ in range(dropped):
        prefixes.evict()
    there = there[dropped:]
    assert len(prefixes) == slots.held == prefixes.nbytes == len(there)
    for tokens in wanted:
        begins = [
            slot
            for slot in there
            if len(kept[slot]) < len(tokens) and tokens[: len(kept[slot])] == kept[slot]
        ]
        found = prefixes.match(tokens)
        best = max(begins, key=lambda slot: len(kept[slot]), default=None)
        assert (None if found is None else found.slot) == best


def test_what_was_found_last_goes_last():
    prefixes = PrefixCache(Slots(), max_bytes=2)
    for slot, tokens in enumerate(([1], [2], [2, 3])):
        prefixes.insert(tokens, slot)
        prefixes.match([1, 9])
    assert prefixes.match([1, 9]).slot == 0
    assert prefixes.match([2, 3, 9]).slot == 2
    assert prefixes.match([2, 9]) is None


def test_a_new_version_of_the_weights_finds_nothing():
    slots = Slots()
    prefixes = PrefixCache(slots, max_bytes=100)
    prefixes.insert([1, 2], 0)
    prefixes.clear()
    assert prefixes.match([1, 2, 3]) is None
    assert slots.held == 0
    prefixes.insert([1, 2], 5)
    assert prefixes.match([1, 2, 3]).slot == 5
