"""Outputs of the forward pass besides the next token: prompt log-probabilities, routed experts.

Both are collected together with a sequence's state. If the sequence is preempted, they are dropped
with the state and collected again (`Sequence.begin`).
"""

from collections.abc import Sequence as Many

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.inference.sampling.sampler import token_logprobs
from nemotron3.inference.sequences import Sequence
from nemotron3.models.nemotron_h import LanguageModel

_LOGIT_ROWS = 256
"""Rows of logits computed at a time for a prompt's log-probabilities: a bound on memory."""


def record_prompt_logprobs(
    model: LanguageModel,
    sequence: Sequence,
    hidden: Float[Tensor, "tokens d_model"],
    *,
    start: int,
    weight_version: int,
) -> None:
    """Append the log-probabilities of the tokens that a chunk of the prompt predicts.

    `start` is the position of the chunk's first token.
    """
    following = sequence.request.prompt[start + 1 : start + 1 + len(hidden)]
    top = sequence.request.params.prompt_logprobs
    assert top is not None
    for first in range(0, len(following), _LOGIT_ROWS):
        tokens = following[first : first + _LOGIT_ROWS]
        logits = model.logits(hidden[first : first + len(tokens)])
        sequence.prompt_logprobs += token_logprobs(
            logits, tokens, top, weight_version=weight_version
        )


def record_routes(
    sequences: Many[Sequence],
    counts: Many[int],
    routes: Many[Int[Tensor, "tokens choice"]],
    *,
    window: int | None = None,
) -> None:
    """Append the experts of the first `counts[i]` tokens of each sequence to its `routes`.

    `routes` has a tensor for each MoE layer. The tokens of the sequences are packed, or with
    `window` each sequence has that many rows; those after the first `counts[i]` are of rejected
    drafts.
    """
    if not routes:
        return
    chosen = torch.stack(list(routes), dim=1).to("cpu", torch.int16)
    at = 0
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.routes.append(chosen[at : at + count].clone())
        at += window or count
