"""Sampling in C++ (see native.cpp)."""

from pathlib import Path

from torch import Tensor

from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import NativeFunction

_SOURCE = Path(__file__).with_name("native.cpp")
_draw = NativeFunction(_SOURCE, "gumbel_argmax", "ppp iii")
_scores = NativeFunction(_SOURCE, "logprobs_and_ranks", "pppp iii")


def gumbel_argmax_native(logits: Tensor, keys: Tensor) -> Tensor:
    """Shapes as in `nemotron3.ops.sampling.api.gumbel_argmax`."""
    logits, keys = contiguous_rows(logits), keys.contiguous()
    rows, vocab = logits.shape
    tokens = keys.new_empty(rows)
    _draw(logits, keys, tokens, rows, vocab, logits.stride(0))
    return tokens


def logprobs_and_ranks_native(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in `nemotron3.ops.sampling.api.logprobs_and_ranks`."""
    logits, tokens = contiguous_rows(logits), tokens.contiguous()
    rows, vocab = logits.shape
    logprobs, ranks = logits.new_empty(rows), tokens.new_empty(rows)
    _scores(logits, tokens, logprobs, ranks, rows, vocab, logits.stride(0))
    return logprobs, ranks
