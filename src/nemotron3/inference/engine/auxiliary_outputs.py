"""What is noted while a sequence is read: log-probabilities of its prompt, experts of its tokens.

Both belong to the state that is built, and start again with it (`Sequence.begin`).
"""

from collections.abc import Sequence as Many

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.inference.sampling.sampler import token_logprobs
from nemotron3.inference.sequences import Sequence
from nemotron3.models.nemotron_h import LanguageModel

_LOGIT_ROWS = 256
"""Rows of logits made at a time for a prompt's log-probabilities."""


def note_prompt_logprobs(
    model: LanguageModel,
    sequence: Sequence,
    hidden: Float[Tensor, "tokens d_model"],
    *,
    start: int,
    weight_version: int,
) -> None:
    """Note those of the tokens that a chunk predicts; `start` is the place of its first token."""
    following = sequence.request.prompt[start + 1 : start + 1 + len(hidden)]
    top = sequence.request.params.prompt_logprobs
    assert top is not None
    for first in range(0, len(following), _LOGIT_ROWS):
        tokens = following[first : first + _LOGIT_ROWS]
        logits = model.logits(hidden[first : first + len(tokens)])
        sequence.prompt_logprobs += token_logprobs(
            logits, tokens, top, weight_version=weight_version
        )


def note_routes(
    sequences: Many[Sequence],
    counts: Many[int],
    routes: Many[Int[Tensor, "tokens choice"]],
    *,
    window: int | None = None,
) -> None:
    """Note the experts of the tokens that stand: `counts` of each sequence.

    The tokens of a sequence follow those of the one before, or every `window` tokens, of which
    those behind `count` were refused.
    """
    if not routes:
        return
    chosen = torch.stack(list(routes), dim=1).to("cpu", torch.int16)
    at = 0
    for sequence, count in zip(sequences, counts, strict=True):
        sequence.routes.append(chosen[at : at + count].clone())
        at += window or count
