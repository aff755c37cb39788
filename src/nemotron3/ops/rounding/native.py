"""Stochastic rounding in C++ (see native.cpp)."""

from pathlib import Path

import torch
from torch import Tensor

from nemotron3.ops.native import ParallelKernel
from nemotron3.ops.rounding.bits import BLOCK, RandomBits

_SOURCE = Path(__file__).with_name("native.cpp")
_to_float16 = ParallelKernel(_SOURCE, "to_float16", "ppp iiiii")
_to_int8 = ParallelKernel(_SOURCE, "to_int8", "pppp iiiiii")
_WORK = 8
"""Cost of an element, in multiply-adds."""


def to_float16_native(x: Tensor, positions: Tensor, bits: RandomBits) -> Tensor:
    """Shapes as in `nemotron3.ops.rounding.reference.to_float16_reference`."""
    half = torch.empty(x.shape, dtype=torch.float16)
    _to_float16(
        x, positions, half, *x.shape, bits.seed, bits.stream, bits.rounds, work=_WORK * x.numel()
    )
    return half


def to_int8_native(x: Tensor, positions: Tensor, bits: RandomBits) -> tuple[Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.rounding.reference.to_int8_reference`."""
    codes = torch.empty(x.shape, dtype=torch.int8)
    steps = x.new_empty(*x.shape[:2], -(-x.shape[2] // BLOCK))
    _to_int8(
        x,
        positions,
        codes,
        steps,
        *x.shape,
        bits.seed,
        bits.stream,
        bits.rounds,
        work=_WORK * x.numel(),
    )
    return codes, steps
