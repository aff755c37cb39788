"""A shuffled order that is computed instead of stored: a bijection of 0 .. size - 1.

A stored shuffle of a corpus's windows is an array as long as the corpus, and state to save. A
Feistel network is a permutation for any round function: write the number as (left, right) with
left < a, right < b and a b >= size, and add to each half in turn a hash of the other,

    left  <- (left  + F(right)) mod a
    right <- (right + F(left))  mod b.

Each line is invertible, so together they permute the a b numbers. Results of `size` and above
(fewer than a of them for a = ceil(sqrt(size))) go through the network again until they are below
`size` ("cycle walking"), which gives a bijection of the smaller set.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6


def permute(
    numbers: NDArray[np.int64], *, size: int, seed: tuple[int | str, ...]
) -> NDArray[np.int64]:
    """The images of `numbers` under the permutation of 0 .. size - 1 with this seed."""
    assert size > 0
    assert numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < size)
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = np.frombuffer(
        hashlib.blake2b(repr(seed).encode(), digest_size=8 * _ROUNDS).digest(), dtype=np.uint64
    )
    current = numbers.astype(np.uint64)
    outside = np.ones(current.shape, dtype=bool)
    while outside.any():
        current[outside] = _network(current[outside], a, b, keys)
        outside = current >= size
    return current.astype(np.int64)


def _network(
    numbers: NDArray[np.uint64], a: int, b: int, keys: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    left, right = np.divmod(numbers, np.uint64(b))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _hash(right, key) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + _hash(left, key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _hash(values: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Mix 64 bits: multiply by odd constants and fold, arithmetic modulo 2^64."""
    mixed = (values ^ key) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(29))
