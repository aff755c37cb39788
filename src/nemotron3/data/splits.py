"""The split into training and held-out text, and the choice of documents under a size limit.

Every decision depends on a hash of a document's text, never on the order or names of files. A copy
of a document is always in the same split as the original, also in another source, so no held-out
document is ever trained on. Holding out every n-th document would have neither property.

Two independent 64-bit numbers come from one hash. `draw` is the order in which documents are taken
when only part of the text is used (the smallest first), so a size limit gives an even sample.
`split` decides what is held out: documents with split / 2^64 < held_out_fraction. So a corpus of
many documents keeps its held-out set when it grows. With few documents, or very different sizes,
this holds out a wrong share of the bytes. Then documents are held out in the order of `split` until
the share is reached, and the one that would exceed it is cut: its end is held out.

A document in several sources gets one decision for all of them.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nemotron3.errors import ConfigError

_RANGE = 2**64
_NEAR = 0.2
"""Largest relative error of the held-out share; beyond it a document is cut."""
_LEAST_PART = 16
"""Fewest bytes on each side of a cut; smaller documents are not cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentKey:
    """The two numbers that determine the use of a document."""

    split: int
    draw: int


def document_key(text: str) -> DocumentKey:
    """The key of a text."""
    raw = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return DocumentKey(
        split=int.from_bytes(raw[:8], "little"), draw=int.from_bytes(raw[8:], "little")
    )


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The split of one source: limits for the numbers of a document's key."""

    draw_limit: int
    """Documents whose `draw` is below it are used."""

    held_out_limit: int
    """Of these, documents whose `split` is below it are held out."""

    sample_limit: int
    """The tokenizer learns from the training documents whose `draw` is below it."""

    shared_limits: Mapping[int, int] = field(default_factory=dict[int, int])
    """The `held_out_limit` of documents that other sources also contain, by their `split`."""

    cuts: Mapping[int, int] = field(default_factory=dict[int, int])
    """Training documents whose end is held out: the bytes of that end, by their `split`."""

    def takes(self, key: DocumentKey) -> bool:
        """Whether the document is used at all."""
        return key.draw < self.draw_limit

    def holds_out(self, key: DocumentKey) -> bool:
        """Whether a document that is used is held out as a whole."""
        return key.split < self.shared_limits.get(key.split, self.held_out_limit)

    def cut_bytes(self, key: DocumentKey) -> int:
        """Bytes at the end of a training document that are held out."""
        return self.cuts.get(key.split, 0)

    def samples(self, key: DocumentKey) -> bool:
        """Whether the tokenizer learns from the document."""
        return self.takes(key) and not self.holds_out(key) and key.draw < self.sample_limit


@dataclass(kw_only=True)
class Survey:
    """The keys and sizes of a source's documents: 24 bytes each, so millions fit in memory."""

    splits: array = field(default_factory=lambda: array("Q"))
    draws: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("Q"))

    def add(self, key: DocumentKey, size: int) -> None:
        """Add a document of `size` bytes."""
        self.splits.append(key.split)
        self.draws.append(key.draw)
        self.sizes.append(size)

    @property
    def num_distinct(self) -> int:
        """Number of distinct documents."""
        return len(np.unique(np.frombuffer(self.splits, np.uint64)))

    @property
    def total_bytes(self) -> int:
        """Bytes of all documents."""
        return sum(self.sizes)


class _Pool(NamedTuple):
    """Distinct documents that occur in the same set of sources, sorted by `split`."""

    splits: NDArray[np.uint64]
    num_bytes: NDArray[np.float64]
    """Bytes of all copies of each."""
    sizes: NDArray[np.float64]
    """Bytes of one copy of each."""


def select(
    surveys: Sequence[Survey],
    *,
    max_bytes: Sequence[int | None],
    held_out_fraction: float,
    sample_fraction: float,
) -> list[Selection]:
    """Decide the splits of a corpus's sources; `max_bytes` has the size limit of each, or None.

    Every source gets text in both splits. A source of one document is always cut, which fails later
    if the document is too short.
    """
    draw_limits = [
        _RANGE if limit is None else _draw_limit(_array(survey.draws), _array(survey.sizes), limit)
        for survey, limit in zip(surveys, max_bytes, strict=True)
    ]
    pools = _pools(surveys, draw_limits, max_bytes)
    # A source's largest pool must give it text in both splits; the others only come near the share.
    obliged = {
        max((owners for owners in pools if index in owners), key=lambda o: pools[o].num_bytes.sum())
        for index in range(len(surveys))
    }
    decided = {
        owners: _hold_out(pool, held_out_fraction, is_obliged=owners in obliged)
        for owners, pool in pools.items()
    }
    selections: list[Selection] = []
    for index, survey in enumerate(surveys):
        shared: dict[int, int] = {}
        cuts: dict[int, int] = {}
        for owners, (limit, cut) in decided.items():
            if index in owners:
                cuts |= cut
                if len(owners) > 1:
                    shared |= dict.fromkeys(pools[owners].splits.tolist(), limit)
        limit, _ = decided.get(frozenset([index]), (0, {}))
        selection = Selection(
            draw_limit=draw_limits[index],
            held_out_limit=limit,
            sample_limit=_RANGE,
            shared_limits=shared,
            cuts=cuts,
        )
        selections.append(_with_sample(selection, survey, sample_fraction))
    return selections


def cut_document(text: str, held_out_bytes: int) -> tuple[str, str]:
    """Cut a document into a front to train on and an end to hold out.

    The cut is at the line end nearest to the ideal position, else between two words, if one of
    these is within a tenth of the held-out bytes from it; else between two characters.
    """
    raw = text.encode()
    wanted = max(len(raw) - held_out_bytes, 0)
    slack = held_out_bytes // 10
    start = max(wanted - slack, 0)
    window = raw[start : wanted + slack]
    for mark in (b"\n", b" "):
        places = [start + i + 1 for i in range(len(window)) if window[i : i + 1] == mark]
        places = [place for place in places if place < len(raw)]
        if places:
            cut = min(places, key=lambda place: abs(place - wanted))
            return raw[:cut].decode(), raw[cut:].decode()
    cut = _character_start(raw, wanted)
    return raw[:cut].decode(), raw[cut:].decode()


def cap_document(text: str, max_bytes: int) -> str:
    """The first `max_bytes` of a document, up to the last line end in them if there is one."""
    raw = text.encode()
    if max_bytes >= len(raw):
        return text
    line_end = raw.rfind(b"\n", 0, max_bytes) + 1
    return raw[
        : line_end if line_end > max_bytes // 2 else _character_start(raw, max_bytes)
    ].decode()


def _character_start(raw: bytes, place: int) -> int:
    """The last position up to `place` that is not inside a UTF-8 sequence."""
    while 0 < place < len(raw) and raw[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _pools(
    surveys: Sequence[Survey], draw_limits: Sequence[int], max_bytes: Sequence[int | None]
) -> dict[frozenset[int], _Pool]:
    """The distinct documents that are used, grouped by the set of sources that contain them."""
    own: list[_Pool] = []
    for survey, draw_limit, limit in zip(surveys, draw_limits, max_bytes, strict=True):
        taken = _below(_array(survey.draws), draw_limit)
        sizes = _array(survey.sizes)[taken].astype(np.float64)
        splits, first, inverse = np.unique(
            _array(survey.splits)[taken], return_index=True, return_inverse=True
        )
        if not len(splits):
            raise ConfigError(
                f"max_bytes = {limit} leaves none of {survey.num_distinct} different documents; "
                "raise it"
            )
        own.append(
            _Pool(splits, np.bincount(inverse, weights=sizes).astype(np.float64), sizes[first])
        )
    values, counts = np.unique(np.concatenate([pool.splits for pool in own]), return_counts=True)
    shared = values[counts > 1]
    pools: dict[frozenset[int], _Pool] = {}
    entries: dict[int, tuple[list[int], float, float]] = {}
    for index, pool in enumerate(own):
        is_shared = np.isin(pool.splits, shared)
        if not is_shared.all():
            pools[frozenset([index])] = _where(pool, ~is_shared)
        columns = [column.tolist() for column in _where(pool, is_shared)]
        for split, num_bytes, size in zip(*columns, strict=True):
            owners, before, _ = entries.get(split, ([], 0.0, 0.0))
            entries[split] = ([*owners, index], before + num_bytes, size)
    for owners in {frozenset(entry[0]) for entry in entries.values()}:
        rows = sorted((s, b, z) for s, (o, b, z) in entries.items() if frozenset(o) == owners)
        splits, num_bytes, sizes = zip(*rows, strict=True)
        pools[owners] = _Pool(
            np.array(splits, np.uint64), np.array(num_bytes), np.array(sizes, np.float64)
        )
    return pools


def _where(pool: _Pool, mask: NDArray[np.bool_]) -> _Pool:
    return _Pool(pool.splits[mask], pool.num_bytes[mask], pool.sizes[mask])


def _hold_out(
    pool: _Pool, held_out_fraction: float, *, is_obliged: bool
) -> tuple[int, dict[int, int]]:
    """The `held_out_limit` of a pool, and the documents to cut with the bytes of their ends."""
    count, total = len(pool.splits), float(pool.num_bytes.sum())
    wanted = held_out_fraction * total
    if count == 1 and is_obliged:
        return 0, {int(pool.splits[0]): max(1, round(held_out_fraction * pool.sizes[0]))}
    least, most = (1, count - 1) if is_obliged else (0, count)
    held = np.concatenate(([0.0], np.cumsum(pool.num_bytes)))  # by the number of documents

    def is_near(number: int) -> bool:
        return least <= number <= most and abs(held[number] - wanted) <= _NEAR * wanted

    limit = int(held_out_fraction * _RANGE)
    if is_near(int(_below(pool.splits, limit).sum())):
        return limit, {}
    fits = min(int(np.searchsorted(held, wanted, side="right")) - 1, count - 1)
    for number in (fits, fits + 1):
        if is_near(number):
            return _limit_of(pool, number), {}
    copies = pool.num_bytes[fits] / pool.sizes[fits]
    cut = round((wanted - held[fits]) / copies)
    if _LEAST_PART <= cut <= pool.sizes[fits] - _LEAST_PART:
        return _limit_of(pool, fits), {int(pool.splits[fits]): cut}
    nearest = min((fits, fits + 1), key=lambda number: abs(held[number] - wanted))
    return _limit_of(pool, min(max(nearest, least), most)), {}


def _limit_of(pool: _Pool, number: int) -> int:
    """The limit that exactly the first `number` documents are below."""
    return int(pool.splits[number - 1]) + 1 if number else 0


def _with_sample(selection: Selection, survey: Survey, sample_fraction: float) -> Selection:
    draws, splits = _array(survey.draws), _array(survey.splits)
    held_out = _below(splits, selection.held_out_limit)
    if selection.shared_limits:
        shared = np.array(list(selection.shared_limits), np.uint64)
        held = [split for split, limit in selection.shared_limits.items() if split < limit]
        is_shared = np.isin(splits, shared)
        held_out[is_shared] = np.isin(splits[is_shared], np.array(held, np.uint64))
    trained = _below(draws, selection.draw_limit) & ~held_out
    sizes = _array(survey.sizes)[trained]
    sample_bytes = int(sample_fraction * int(sizes.sum()))
    largest = int(sizes.max())  # at least one document, whatever the fraction
    limit = _draw_limit(draws[trained], sizes, max(sample_bytes, largest))
    return replace(selection, sample_limit=limit)


def _array(values: array) -> NDArray[np.uint64]:
    return np.frombuffer(values, np.uint64)


def _draw_limit(draws: np.ndarray, sizes: np.ndarray, max_bytes: int) -> int:
    """The `draw_limit` for which the used documents have at most `max_bytes` bytes."""
    order = np.argsort(draws, kind="stable")
    within = int(np.searchsorted(np.cumsum(sizes[order]), max_bytes, side="right"))
    return _RANGE if within == len(order) else int(draws[order[within]])


def _below(keys: np.ndarray, limit: int) -> np.ndarray:
    # 2^64 does not fit in uint64.
    return keys < np.uint64(limit) if limit < _RANGE else np.ones(len(keys), dtype=bool)
