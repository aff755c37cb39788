"""Which documents are trained on, which are held out, and which are left when text is capped.

Every decision hangs on a hash of the document's text alone. So it does not depend on the order of
files, on their names or on what else is in the corpus; a copy of a document always falls on the
same side as the original, so no held-out text is ever trained on, not even through a duplicate;
and a corpus that grows keeps its held-out set. The obvious other way, every n-th document, has
none of these properties.

Two independent 64-bit numbers come from one hash: `split` says whether a document is held out
(split / 2^64 < held_out_fraction), `draw` in which order documents are taken when only some of the
text is wanted (the smallest first), which makes a cap an even sample.
"""

import hashlib
from array import array
from dataclasses import dataclass, field

import numpy as np

from nemotron3.errors import ConfigError

_RANGE = 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentKey:
    """The two numbers that decide about a document."""

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
    """The decision for one source: limits that a document's key is compared with."""

    draw_limit: int
    """Documents with a `draw` below it are taken."""

    held_out_limit: int
    """Of these, documents with a `split` below it are held out."""

    sample_limit: int
    """Documents trained on with a `draw` below it are the sample that the tokenizer learns from."""

    def takes(self, key: DocumentKey) -> bool:
        """Whether the document is used at all."""
        return key.draw < self.draw_limit

    def holds_out(self, key: DocumentKey) -> bool:
        """Whether a document that is used is held out."""
        return key.split < self.held_out_limit

    def samples(self, key: DocumentKey) -> bool:
        """Whether the tokenizer learns from the document."""
        return self.takes(key) and not self.holds_out(key) and key.draw < self.sample_limit


@dataclass(kw_only=True)
class Survey:
    """The keys and sizes of a source's documents: 24 bytes for each, so millions fit in memory."""

    splits: array = field(default_factory=lambda: array("Q"))
    draws: array = field(default_factory=lambda: array("Q"))
    sizes: array = field(default_factory=lambda: array("Q"))

    def add(self, key: DocumentKey, size: int) -> None:
        """Note a document of `size` bytes."""
        self.splits.append(key.split)
        self.draws.append(key.draw)
        self.sizes.append(size)

    @property
    def num_distinct(self) -> int:
        """Number of different documents."""
        return len(np.unique(np.frombuffer(self.splits, np.uint64)))

    @property
    def total_bytes(self) -> int:
        """Bytes of all documents."""
        return sum(self.sizes)

    def select(
        self, *, held_out_fraction: float, max_bytes: int | None, sample_fraction: float
    ) -> Selection:
        """Decide for a source of two or more different documents.

        Both sides get at least one document: where the hash gives a side none, the document that
        is nearest to the limit goes there.
        """
        draws = np.frombuffer(self.draws, np.uint64)
        splits = np.frombuffer(self.splits, np.uint64)
        sizes = np.frombuffer(self.sizes, np.uint64)
        draw_limit = _RANGE
        if max_bytes is not None:
            draw_limit = _draw_limit(draws, sizes, max_bytes)
        taken = _below(draws, draw_limit)
        distinct = np.unique(splits[taken])
        if len(distinct) < 2:
            raise ConfigError(
                f"max_bytes = {max_bytes} leaves {len(distinct)} different documents of "
                f"{self.num_distinct}; one to train on and one to hold out are needed: raise it"
            )
        held_out_limit = int(held_out_fraction * _RANGE)
        held_out_limit = min(max(held_out_limit, int(distinct[0]) + 1), int(distinct[-1]))
        trained = taken & ~_below(splits, held_out_limit)
        sample_bytes = int(sample_fraction * int(sizes[trained].sum()))
        largest = int(sizes[trained].max())  # at least one document, whatever the fraction
        return Selection(
            draw_limit=draw_limit,
            held_out_limit=held_out_limit,
            sample_limit=_draw_limit(draws[trained], sizes[trained], max(sample_bytes, largest)),
        )


def cut_document(text: str, *, held_out_fraction: float, max_bytes: int | None) -> tuple[str, str]:
    """Cut the one document of a source into a front to train on and an end to hold out.

    The cut lies after the nearest line end before the wanted place, where there is one; a cap takes
    the front of the text.
    """
    raw = text.encode()
    if max_bytes is not None:
        raw = raw[: _line_end(raw, max_bytes)]
    wanted = len(raw) - max(1, round(held_out_fraction * len(raw)))
    cut = _line_end(raw, wanted)
    return raw[:cut].decode(), raw[cut:].decode()


def _line_end(raw: bytes, wanted: int) -> int:
    """The last place up to `wanted` after a line end, or else between two characters."""
    if wanted >= len(raw):
        return len(raw)
    line_end = raw.rfind(b"\n", 0, wanted) + 1
    if line_end > wanted // 2:
        return line_end
    while wanted > 0 and raw[wanted] & 0xC0 == 0x80:  # inside a UTF-8 sequence
        wanted -= 1
    return wanted


def _draw_limit(draws: np.ndarray, sizes: np.ndarray, max_bytes: int) -> int:
    """The limit below which the drawn documents have at most `max_bytes` bytes."""
    order = np.argsort(draws, kind="stable")
    within = int(np.searchsorted(np.cumsum(sizes[order]), max_bytes, side="right"))
    return _RANGE if within == len(order) else int(draws[order[within]])


def _below(keys: np.ndarray, limit: int) -> np.ndarray:
    # 2^64 itself is no uint64.
    return keys < np.uint64(limit) if limit < _RANGE else np.ones(len(keys), dtype=bool)
