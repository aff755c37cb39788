"""Random numbers that depend only on the place where they are used.

A generator that is advanced draw by draw gives a request other tokens whenever its neighbours, its
chunks or its drafts change how often it is asked. Here the noise of a token is a hash of the
request's seed, the answer's index, the position in the answer and the token itself. What is chosen
at a position is then a function of the logits there: the same in any batch, with and without
speculation, before and after preemption, and the same on every device.

The hash is the output function of SplitMix64 (Steele, Lea & Flood, 2014) over a stream that starts
where another round of it puts the position. Only tokens that can still be chosen need noise, so a
draw of 20 candidates from a vocabulary of 131,072 costs 20 hashes.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

_WORD = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def position_key(seed: int, index: int, position: int) -> int:
    """Where the noise of one position of one answer starts: a signed word of 64 bits."""
    word = 0
    for part in (seed, index, position):
        word = _hash((word ^ part) + _STEP & _WORD)
    return _signed(word)


def gumbel(
    keys: Int64[Tensor, "*shape"], tokens: Int64[Tensor, "*shape"]
) -> Float64[Tensor, "*shape"]:
    """Standard Gumbel noise of each token under the key beside it.

    The argmax of logits plus this noise is a draw from their softmax. It is computed in 64 bits, so
    that a vector unit's and a scalar unit's logarithm cannot differ where it would be seen, and
    from the side of small exponentials, where the winner is: -log(1 - u) keeps every bit of a small
    u, while -log(u) near 1 would give improbable tokens a handful of values.
    """
    uniform = (random_bits(keys, tokens).double() + 0.5) * 2.0**-52  # in (0, 1), ends excluded
    return -torch.log(-torch.log1p(-uniform))


def gumbel_bound(
    keys: Int64[Tensor, "*shape"], tokens: Int64[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """A quick upper bound of `gumbel`, to within `ROUNDING`: -log(u), in 32 bits.

    It is close to the noise where that is large, so it finds the few tokens that may win.
    """
    return -(random_bits(keys, tokens).float() * 2.0**-52).log_()


ROUNDING = 1e-4
"""More than 32-bit numbers below 100 lose in a logarithm and a sum."""


def random_bits(
    keys: Int64[Tensor, "*shape"], tokens: Int64[Tensor, "*shape"]
) -> Int64[Tensor, "*shape"]:
    """52 random bits of each token under the key beside it."""
    word = keys + (tokens + 1) * _signed(_STEP)  # wraps around
    for shift, factor in zip(_SHIFTS[:2], _MIX, strict=True):
        word.bitwise_xor_(_shift_right(word, shift)).mul_(_signed(factor))
    return _shift_right(word.bitwise_xor_(_shift_right(word, _SHIFTS[2])), 12)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    return (word >> bits).bitwise_and_(_WORD >> bits)  # the sign must not follow


def _hash(word: int) -> int:
    for shift, factor in zip(_SHIFTS[:2], _MIX, strict=True):
        word = (word ^ word >> shift) * factor & _WORD
    return word ^ word >> _SHIFTS[2]


def _signed(word: int) -> int:
    return word - 2**64 if word >> 63 else word
