"""Cross-entropy over chunks of tokens; a chunk's logits are replaced by their gradients in place.

The algorithm is that of `torch.py`, and cuBLAS computes the three products. Between them `torch.py`
makes half a dozen passes over the logits in float32. Here one program handles one token's row: it
reads the row for the normaliser and again, mostly from cache, to write the gradient in its place.
Logits keep the dtype of the product, half the memory in bfloat16, while every sum is float32.

Every chunk makes one more pass over the gradient of the whole output matrix, which with 131,072
entries takes as long as the products of some hundred tokens. So chunks are as large as a small
share of the device's memory allows, and of equal size.

A token counts as correct if no logit exceeds the target's, and no earlier entry equals it; that
needs no argmax. The output matrix's gradient is summed in float32, for the reason in `torch.py`.
"""

# A Triton kernel takes pointers and numbers without annotations.
# ruff: noqa: ANN001, ANN202
# pyright: reportOperatorIssue=false

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron3.ops.cross_entropy.autograd import (
    Request,
    Scored,
    fused_cross_entropy,
    recomputed_logprobs,
)
from nemotron3.ops.cross_entropy.torch import CACHED_LOGITS
from nemotron3.ops.kernels import require_kernel_dtypes

jit: Any = triton.jit
_SHARE_OF_MEMORY = 1 / 64
"""Share of device memory for a chunk's logits: 1.3 GB of 80, 4,800 tokens of the large models."""
_BLOCK = 4096
"""Entries of the vocabulary that a program reads at a time."""
_ENTRIES_PER_WARP = 256


def _score(hidden: Tensor, weight: Tensor, targets: Tensor, request: Request) -> Scored:
    require_kernel_dtypes("cross_entropy", hidden, weight)
    weight = weight.to(hidden.dtype)
    (tokens, _), vocab = hidden.shape, len(weight)
    given = request.token_weights
    has_weights = given is not None
    # Without weights the kernel never reads this pointer.
    given = given.contiguous() if has_weights else targets
    d_hidden = torch.empty_like(hidden) if request.wants_hidden else None
    d_weight = None
    if request.wants_weight:
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
    losses = torch.empty(tokens, dtype=torch.float32, device=hidden.device)
    correct = torch.empty(tokens, dtype=torch.bool, device=hidden.device)
    chunk = _chunk(tokens, max(1, (request.max_logits or _logits_with_room(hidden)) // vocab))
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        logits = hidden[rows] @ weight.T
        _row_kernel[(len(logits),)](
            logits, targets[rows], given[rows], losses[rows], correct[rows], vocab, request.scale,
            MAKE_GRADIENT=has_weights, BLOCK=block,
            num_warps=max(1, min(16, block // _ENTRIES_PER_WARP)),
        )  # fmt: skip
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_hidden[rows])
        if d_weight is not None:
            if hidden.dtype == torch.float32:
                d_weight.addmm_(logits.T, hidden[rows])
            else:
                d_weight += logits.T @ hidden[rows]
    return Scored(losses, correct, d_hidden, d_weight)


linear_cross_entropy_triton = partial(fused_cross_entropy, _score)
token_logprobs_triton = partial(recomputed_logprobs, _score)


def _logits_with_room(hidden: Tensor) -> int:
    if hidden.device.type != "cuda":  # the interpreter's
        return CACHED_LOGITS
    memory = torch.cuda.get_device_properties(hidden.device).total_memory
    return int(memory * _SHARE_OF_MEMORY / hidden.element_size())


def _chunk(tokens: int, most: int) -> int:
    """Tokens per chunk: all chunks but the last have the same size, and the last nearly so."""
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


@jit
def _row_kernel(  # noqa: PLR0913
    logits_ptr, targets_ptr, token_weights_ptr, losses_ptr, correct_ptr, vocab, scale,
    MAKE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For one token: loss = log sum_v exp(l_v) - l_y, and l_v <- w (softmax(l)_v - [v = y]).

    `scale` multiplies all logits as they are read.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    target = tl.load(targets_ptr + row)
    exists = (target >= 0) & (target < vocab)
    target_logit = tl.load(logits_ptr + target, mask=exists, other=float("nan")).to(tl.float32)
    target_logit *= scale
    # The running maximum starts from the target's logit: it is finite, so rescaling the empty sum
    # gives no NaN.
    highest = target_logit
    total = 0.0
    beaten = 0
    for first in range(0, vocab, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        mask = entry < vocab
        logits = tl.load(logits_ptr + entry, mask=mask, other=float("-inf")).to(tl.float32) * scale
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        highest = higher
        better = (logits > target_logit) | ((logits == target_logit) & (entry < target))
        beaten += tl.sum((better & mask).to(tl.int32), axis=0)
    normalizer = highest + tl.log(total)
    tl.store(losses_ptr + row, normalizer - target_logit)
    tl.store(correct_ptr + row, beaten == 0)
    if MAKE_GRADIENT:
        token_weight = tl.load(token_weights_ptr + row).to(tl.float32)
        for first in range(0, vocab, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            mask = entry < vocab
            logits = tl.load(logits_ptr + entry, mask=mask, other=float("-inf")).to(tl.float32)
            logits *= scale
            gradient = tl.exp(logits - normalizer) - tl.where(entry == target, 1.0, 0.0)
            gradient *= token_weight
            tl.store(logits_ptr + entry, gradient.to(logits_ptr.dtype.element_ty), mask=mask)
