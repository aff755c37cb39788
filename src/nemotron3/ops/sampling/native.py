"""Sampling in C++ (see native.cpp)."""

from pathlib import Path

from torch import Tensor

from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import NativeFunction

_draw = NativeFunction(Path(__file__).with_name("native.cpp"), "gumbel_argmax", "ppp iii")


def gumbel_argmax_native(logits: Tensor, keys: Tensor) -> Tensor:
    """Shapes as in `nemotron3.ops.sampling.api.gumbel_argmax`."""
    logits, keys = contiguous_rows(logits), keys.contiguous()
    rows, vocab = logits.shape
    tokens = keys.new_empty(rows)
    _draw(logits, keys, tokens, rows, vocab, logits.stride(0))
    return tokens
