"""Losses over chunks of tokens, with products and softmax in C++ (see torch.py).

Hidden states may be bfloat16, and are multiplied as such, with a weight of either type. Logits,
softmax and the gradient of the weight are float32.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nemotron3.ops.cross_entropy.autograd import (
    Request,
    Scored,
    fused_cross_entropy,
    recomputed_logprobs,
)
from nemotron3.ops.cross_entropy.torch import CACHED_LOGITS
from nemotron3.ops.linear.native import input_gradient, product, weight_gradient
from nemotron3.ops.native import NativeFunction

_rows = NativeFunction(Path(__file__).with_name("native.cpp"), "cross_entropy_rows", "pppppp ii")


def _score(hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> Scored:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    given, tokens = request.token_weights, len(hidden)
    given = None if given is None else given.contiguous()
    d_hidden = torch.empty_like(hidden) if request.wants_hidden else None
    d_weight = None
    if request.wants_weight and not tokens:
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
    losses = hidden.new_empty(tokens, dtype=torch.float32)
    correct = torch.empty(tokens, dtype=torch.bool)
    chunk = max(1, min((request.max_logits or CACHED_LOGITS) // len(weight), tokens))
    room = hidden.new_empty(chunk, len(weight), dtype=torch.float32)
    is_narrow = hidden.dtype == torch.bfloat16 and given is not None
    narrow = hidden.new_empty(chunk, len(weight)) if is_narrow else None
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        logits = product(hidden[rows], weight, into=room[: tokens - start])
        if request.scale != 1:
            logits *= request.scale
        token_weights = None if given is None else given[rows]
        d_logits = logits if narrow is None else narrow[: len(logits)]
        operands = (logits, targets[rows], token_weights, losses[rows], correct[rows], narrow)
        _rows(*operands, *logits.shape)
        if d_hidden is not None:
            input_gradient(d_logits, weight=weight, into=d_hidden[rows])
        if request.wants_weight:
            d_weight = weight_gradient(d_logits, x=hidden[rows], add_to=d_weight)
    return Scored(losses, correct, d_hidden, d_weight)


linear_cross_entropy_native = partial(fused_cross_entropy, _score)
token_logprobs_native = partial(recomputed_logprobs, _score)
