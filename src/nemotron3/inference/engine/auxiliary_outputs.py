"""Outputs of the forward pass besides the next token: log-probabilities, routed experts.

Those of prompts are collected together with a sequence's state. If the sequence is preempted, they
are dropped with the state and collected again (`Sequence.begin`).
"""

from collections.abc import Sequence as Many
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.inference.requests import TokenLogprob
from nemotron3.inference.sampling.sampler import token_logprobs
from nemotron3.inference.sequences import Sequence
from nemotron3.models.nemotron_h import LanguageModel

_LOGIT_ROWS = 256
"""Rows of logits that are scored at a time: a bound on memory."""


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


def answer_logprobs(
    sequences: Many[Sequence],
    accepted: Many[Many[int]],
    logits: Float[Tensor, "sequence step vocab"],
    *,
    weight_version: int,
) -> list[list[TokenLogprob]]:
    """The log-probabilities of the accepted tokens of each sequence; none where none are wanted.

    Sequences that want the same number of alternatives are scored together.
    """
    found: list[list[TokenLogprob]] = [[] for _ in sequences]
    by_top: dict[int, list[int]] = {}
    for row, sequence in enumerate(sequences):
        if (top := sequence.request.params.logprobs) is not None:
            by_top.setdefault(top, []).append(row)
    steps, flat = logits.shape[1], logits.flatten(0, 1)
    for top, rows in by_top.items():
        tokens = [token for row in rows for token in accepted[row]]
        places = [row * steps + step for row in rows for step in range(len(accepted[row]))]
        scores: list[TokenLogprob] = []
        for first in range(0, len(places), _LOGIT_ROWS):
            part = slice(first, first + _LOGIT_ROWS)
            at = torch.tensor(places[part], device=logits.device)
            scores += token_logprobs(
                flat.index_select(0, at), tokens[part], top, weight_version=weight_version
            )
        each = iter(scores)
        for row in rows:
            found[row] = list(islice(each, len(accepted[row])))
    return found


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
