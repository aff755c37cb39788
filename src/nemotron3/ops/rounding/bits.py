"""Random bits that are a function of layer, element and position only.

With a stateful generator, a sequence would get other bits in another batch. A counter-based one has
no state: Philox4x32 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011) turns
128 bits of counter and 64 of key into 128 random bits. The key is the seed and the stream (a
layer); the counter is an element of the state and the position in the sequence. So the same tokens
are rounded alike in any slot and batch, after a preemption, and as drafts.

Element and position are the first and the third word of the counter, which the first round
multiplies. With the position in the second word, five rounds leave a correlation of 0.06 between
consecutive positions, which a slowly decaying state would accumulate; in the third word they leave
less than 0.01 (docs/lab-notes/state-precision.md).

Each element takes 16 bits, so a counter serves eight elements. They are chosen for vectors of 16
lanes: of 128 consecutive elements, counter i serves i, 16 + i, ..., 112 + i, the low half of a word
first.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

BLOCK = 128
"""Elements that 16 counters serve, and elements that share a scale in int8."""
LANES = 16
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomBits:
    """The source of random bits: a seed, a stream (a layer), and the number of Philox rounds.

    Philox's authors recommend ten rounds, and seven pass all tests of randomness; rounding needs
    fewer.
    """

    seed: int
    stream: int = 0
    rounds: int = 10

    def __post_init__(self) -> None:
        for name, word in (("seed", self.seed), ("stream", self.stream)):
            if not 0 <= word <= _WORD:
                raise ValueError(f"{name} of random bits is {word}; expected 0 to 2^32 - 1")
        if self.rounds < 1:
            raise ValueError(f"rounds of Philox are {self.rounds}; expected 1 or more")


def philox(counter: list[Tensor], key: tuple[int, int], rounds: int) -> list[Tensor]:
    """The four words after `rounds` rounds; words are int64 tensors of values below 2^32."""
    a, b, c, d = counter
    key_a, key_b = key
    for _ in range(rounds):
        high_a, low_a = _product(a, _MULTIPLIERS[0])
        high_c, low_c = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ key_a, low_c, high_a ^ d ^ key_b, low_a
        key_a, key_b = (key_a + _KEY_STEPS[0]) & _WORD, (key_b + _KEY_STEPS[1]) & _WORD
    return [a, b, c, d]


def sixteen_bits(
    size: int, positions: Int[Tensor, " row"], bits: RandomBits
) -> Int[Tensor, "row {size}"]:
    """16 random bits for each of `size` elements at each position, as int64."""
    counters = -(-size // BLOCK) * LANES
    element, position = torch.broadcast_tensors(
        torch.arange(counters, device=positions.device), positions.unsqueeze(1) & _WORD
    )
    zero = torch.zeros_like(element)
    words = philox([element, zero, position, zero], (bits.seed, bits.stream), bits.rounds)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    blocks = halves.unflatten(1, (-1, LANES)).transpose(2, 3)  # row block half lane
    return blocks.flatten(1)[:, :size]


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of an unsigned 64-bit product, which would overflow int64."""
    low_part = word * (multiplier & 0xFFFF)
    middle = word * (multiplier >> 16) + (low_part >> 16)
    return middle >> 16, (middle << 16 | low_part & 0xFFFF) & _WORD
