"""Baselines: simple models and compressors on held-out text, in bits per byte.

A loss per token depends on the vocabulary and cannot be compared. Bits per byte can, and these
baselines are easy to understand:

    unigram        each byte by its frequency in the training text
    n-gram         each byte from the n - 1 before it, Witten-Bell smoothing (below)
    gzip, xz       the held-out text compressed alone, at the strongest setting
    xz after train the held-out text compressed after the end of the training text, minus the size
                   of the latter alone: like the other models, xz has then seen training text

The n-gram model interpolates all its orders: with c(h, b) how often byte b followed context h,
c(h) the sum over b, and t(h) the number of different bytes that did,

    p(b | h) = (c(h, b) + t(h) p(b | h')) / (c(h) + t(h)),    h' = h without its first byte,

down to p(b) = 1/256 below the empty context (Witten and Bell, IEEE Trans. Inf. Theory 37, 1991). A
context never reaches into another document. A context and its byte fit into 64 bits, so the counts
of an order are one sorted array and the model is a few calls of numpy.

Every number counts all bytes of the held-out text. The compressors get the documents end to end,
without separators.
"""

import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotron3.errors import ConfigError, DataError

_MAX_ORDER = 7
_XZ_PRESET = 6
_GZIP_LEVEL = 9


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """Limits on the work of the baselines."""

    order: int = 6
    """Length n of the n-gram model: each byte from the n - 1 before it, at most 7."""

    train_bytes: int = 8_000_000
    """Most bytes of training text that the n-gram model counts."""

    xz_train_bytes: int = 2_000_000
    """Bytes of the end of the training text that xz compresses before the held-out text."""

    def __post_init__(self) -> None:
        if not 2 <= self.order <= _MAX_ORDER:
            raise ConfigError(f"order = {self.order}: it lies in 2 to {_MAX_ORDER}")
        if self.train_bytes <= 0 or self.xz_train_bytes <= 0:
            raise ConfigError(
                f"train_bytes = {self.train_bytes}, xz_train_bytes = {self.xz_train_bytes}: "
                f"both must be positive"
            )


def baseline_bits_per_byte(
    train: Sequence[str], held_out: Sequence[str], config: BaselinesConfig | None = None
) -> dict[str, float]:
    """Bits per byte of each baseline on the held-out documents, from the training documents."""
    config = config or BaselinesConfig()
    train_raw = _first_bytes([text.encode() for text in train], config.train_bytes)
    held_out_raw = [text.encode() for text in held_out]
    if not any(train_raw) or not any(held_out_raw):
        raise DataError("baselines need text to count and held-out text; one of them is empty")
    test = b"".join(held_out_raw)
    tail = b"".join(train_raw)[-config.xz_train_bytes :]
    bits = 8 / len(test)
    by_order = _ngram_bits(train_raw, held_out_raw, config.order)
    return {
        "unigram": by_order[0],
        f"{config.order}-gram": by_order[-1],
        "gzip": bits * len(zlib.compress(test, _GZIP_LEVEL, zlib.MAX_WBITS | 16)),
        "xz": bits * _xz_size(test),
        "xz after train": bits * (_xz_size(tail + test) - _xz_size(tail)),
    }


def _ngram_bits(train: Sequence[bytes], test: Sequence[bytes], order: int) -> list[float]:
    """Bits per byte of the interpolated models of length 1 to `order`."""
    train_bytes, train_depth = _stream(train, order)
    test_bytes, test_depth = _stream(test, order)
    probability = np.full(len(test_bytes), 1 / 256)
    bits: list[float] = []
    train_contexts = np.zeros(len(train_bytes), dtype=np.uint64)
    test_contexts = np.zeros(len(test_bytes), dtype=np.uint64)
    for length in range(order):  # of the context
        if length:
            # Each byte's context grows by the byte that is `length` places before it.
            train_contexts |= _shifted(train_bytes, length)
            test_contexts |= _shifted(test_bytes, length)
        # A byte so near to the start of its document that the context would reach beyond it is not
        # counted, and keeps the probability from the longest possible context.
        counted, asked = train_depth >= length, test_depth >= length
        if not counted.any():  # all documents are shorter than the context
            bits.append(bits[-1])
            continue
        joint, joint_counts = np.unique(
            train_contexts[counted] << np.uint64(8) | train_bytes[counted], return_counts=True
        )
        contexts, first = np.unique(joint >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(joint_counts, first)
        kinds = np.diff(np.append(first, len(joint)))
        context = test_contexts[asked]
        of_context = _lookup(contexts, context)
        total = np.where(of_context < 0, 0, totals[of_context])
        kind = np.where(of_context < 0, 1, kinds[of_context])  # unseen: the shorter context alone
        of_joint = _lookup(joint, context << np.uint64(8) | test_bytes[asked])
        count = np.where(of_joint < 0, 0, joint_counts[of_joint])
        probability[asked] = (count + kind * probability[asked]) / (total + kind)
        bits.append(float(-np.log2(probability).mean()))
    assert all(math.isfinite(value) for value in bits)
    return bits


def _stream(documents: Sequence[bytes], order: int) -> tuple[NDArray[np.uint64], NDArray]:
    """The concatenated bytes, and each byte's position in its document, at most `order`."""
    data = np.frombuffer(b"".join(documents), dtype=np.uint8).astype(np.uint64)
    depth = np.full(len(data), order, dtype=np.int8)
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    for place in range(order - 1, -1, -1):
        inside = starts + place
        depth[inside[inside < len(data)]] = place
    return data, depth


def _shifted(data: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """The byte `length` places before each place, moved to its position in the context."""
    moved = np.zeros_like(data)
    moved[length:] = data[:-length] << np.uint64(8 * (length - 1))
    return moved


def _lookup(table: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The index of each key in a sorted table, or -1 if absent."""
    places = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[places] == keys, places, -1)


def _xz_size(raw: bytes) -> int:
    return len(lzma.compress(raw, preset=_XZ_PRESET))


def _first_bytes(documents: Sequence[bytes], limit: int) -> list[bytes]:
    taken: list[bytes] = []
    for document in documents:
        if limit <= 0:
            break
        taken.append(document[:limit])
        limit -= len(document)
    return taken
