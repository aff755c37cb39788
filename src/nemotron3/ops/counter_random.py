"""Counter-based random numbers: element i is a function of a key and of i alone.

A stateful generator gives its numbers in sequence, so a process that holds a shard of a parameter
would have to draw everything before it. Here the number of element i is a hash of a key and of i
(SplitMix64, as in `sampling/noise.py`): any part can be drawn by itself, in any order, on any
device, with the same result. Two neighbouring elements share a 64-bit word and take 24 bits each,
the number of bits that float32 resolves in [0, 1).
"""

import math
from hashlib import blake2b

import torch
from jaxtyping import Float32
from torch import Tensor

from nemotron3.ops.sampling.noise import random_bits

_BITS = 24
_MASK = 2**_BITS - 1


def stream_key(seed: int, name: str) -> int:
    """The key of a named stream: a signed 64-bit integer."""
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def uniform(key: int, start: int, stop: int, device: torch.device) -> Float32[Tensor, " element"]:
    """Uniform numbers in [0, 1) for elements `start` to `stop` - 1."""
    pairs = torch.stack(_integers(key, start, stop, device), dim=-1)
    return _of_pairs(pairs.float().mul_(2.0**-_BITS), start, stop)


def normal(key: int, start: int, stop: int, device: torch.device) -> Float32[Tensor, " element"]:
    """Standard normal numbers for elements `start` to `stop` - 1, in pairs (Box-Muller)."""
    for_radius, for_angle = _integers(key, start, stop, device)
    # Adding one avoids the logarithm of zero.
    radius = (for_radius + 1).float().mul_(2.0**-_BITS).log_().mul_(-2.0).sqrt_()
    angle = for_angle.float().mul_(2.0 * math.pi * 2.0**-_BITS)
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return _of_pairs(pairs, start, stop)


def _integers(key: int, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """24 bits for each of the two elements of every pair that the range touches."""
    places = torch.arange(start // 2, (stop + 1) // 2, device=device)
    bits = random_bits(torch.tensor(key, device=device), places)
    return bits >> _BITS & _MASK, bits & _MASK


def _of_pairs(pairs: Tensor, start: int, stop: int) -> Tensor:
    return pairs.flatten()[start % 2 : start % 2 + stop - start]
