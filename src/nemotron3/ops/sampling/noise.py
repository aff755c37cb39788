"""Random numbers that depend only on request, position and token.

With a stateful generator, the tokens of a request would depend on everything that changes the
number of draws: other requests in the batch, prefill chunks, drafts. Here the noise of a token is a
hash of the request's seed, the answer's index, the position in the answer and the token itself. The
token chosen at a position is then a function of the logits there: the same in any batch, with and
without speculation, before and after preemption, and on every device.

The hash is the output function of SplitMix64 (Steele, Lea & Flood, 2014) over a stream whose start
is the hash of the position. Only tokens that can still be chosen need noise, so a draw among 20
candidates of a vocabulary of 131,072 costs 20 hashes.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

_WORD = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def stream_key(seed: int, index: int) -> int:
    """The key of the noise of one answer: an unsigned 64-bit integer."""
    return _hash((_hash(seed + _STEP & _WORD) ^ index) + _STEP & _WORD)


def key_in_stream(stream: int, position: int) -> int:
    """The key of the noise at one position of an answer: a signed 64-bit integer."""
    return _signed(_hash((stream ^ position) + _STEP & _WORD))


def position_key(seed: int, index: int, position: int) -> int:
    """The key of the noise at one position of one answer, from its request's seed."""
    return key_in_stream(stream_key(seed, index), position)


def gumbel(
    keys: Int64[Tensor, "*shape"], tokens: Int64[Tensor, "*shape"]
) -> Float64[Tensor, "*shape"]:
    """Standard Gumbel noise of each token under the key beside it.

    The argmax of logits plus this noise is a draw from their softmax. It is computed in float64, so
    that differences between vector and scalar logarithms do not show. It uses -log(1 - u) instead
    of -log(u): large noise, which decides the draw, then comes from a small u, whose bits float64
    keeps all, and not from a u near 1, where only a handful of values exist.
    """
    uniform = (random_bits(keys, tokens).double() + 0.5) * 2.0**-52  # in (0, 1), ends excluded
    return -torch.log(-torch.log1p(-uniform))


def gumbel_bound(
    keys: Int64[Tensor, "*shape"], tokens: Int64[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """A fast upper bound of `gumbel`, up to `ROUNDING`: -log(u) in float32.

    It is close to the noise where the noise is large, so it finds the few tokens that may win.
    """
    return -(random_bits(keys, tokens).float() * 2.0**-52).log_()


ROUNDING = 1e-4
"""Bound of the float32 rounding error of a logarithm and a sum, for values below 100."""


def random_bits(
    keys: Int64[Tensor, "*shape"], tokens: Int64[Tensor, "*shape"]
) -> Int64[Tensor, "*shape"]:
    """52 random bits for each token under the key beside it."""
    word = keys + (tokens + 1) * _signed(_STEP)  # wraps around
    for shift, factor in zip(_SHIFTS[:2], _MIX, strict=True):
        word.bitwise_xor_(_shift_right(word, shift)).mul_(_signed(factor))
    return _shift_right(word.bitwise_xor_(_shift_right(word, _SHIFTS[2])), 12)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    return (word >> bits).bitwise_and_(_WORD >> bits)  # clears the sign's copies


def _hash(word: int) -> int:
    word = (word ^ word >> _SHIFTS[0]) * _MIX[0] & _WORD
    word = (word ^ word >> _SHIFTS[1]) * _MIX[1] & _WORD
    return word ^ word >> _SHIFTS[2]


def _signed(word: int) -> int:
    return word - 2**64 if word >> 63 else word
