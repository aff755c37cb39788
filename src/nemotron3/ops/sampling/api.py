"""The entry points of sampling."""

from jaxtyping import Float, Int64
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_axes, check_indices, check_integers, check_positive
from nemotron3.ops.sampling.reference import (
    gumbel_argmax_reference,
    logprobs_and_ranks_reference,
)
from nemotron3.ops.sampling.torch import gumbel_argmax_torch, logprobs_and_ranks_torch

_DRAWS = {
    "reference": gumbel_argmax_reference,
    "torch": gumbel_argmax_torch,
    "native": Kernel("nemotron3.ops.sampling.native", "gumbel_argmax_native"),
}
_SCORES = {
    "reference": logprobs_and_ranks_reference,
    "torch": logprobs_and_ranks_torch,
    "native": Kernel("nemotron3.ops.sampling.native", "logprobs_and_ranks_native"),
}


def gumbel_argmax(
    logits: Float[Tensor, "rows vocab"], keys: Int64[Tensor, " rows"], *, backend: Backend = "auto"
) -> Int64[Tensor, " rows"]:
    """The token of each row with the largest sum of logit and noise: a draw from the softmax.

    The noise is `noise.gumbel` under the row's key. Tokens whose logit is minus infinity are never
    drawn. A row with no other tokens, or with a NaN, gives -1.
    """
    check_axes("gumbel_argmax", "logits", logits, "rows vocab")
    check_positive("gumbel_argmax", vocab=logits.shape[1])
    keys = check_integers("gumbel_argmax", "keys", keys, logits.shape[:1], logits)
    return resolve("gumbel_argmax", backend, _DRAWS, logits)(logits, keys)


def logprobs_and_ranks(
    logits: Float[Tensor, "rows vocab"],
    tokens: Int64[Tensor, " rows"],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, " rows"], Int64[Tensor, " rows"]]:
    """The log-probability of one token of each row, in float32, and its rank.

    The rank is the number of tokens that are at least as probable, so two most probable tokens both
    have rank 2. It has no gradients.
    """
    check_axes("logprobs_and_ranks", "logits", logits, "rows vocab")
    rows, vocab = logits.shape
    check_positive("logprobs_and_ranks", vocab=vocab)
    tokens = check_indices("logprobs_and_ranks", "tokens", tokens, (rows,), logits, (0, vocab))
    return resolve("logprobs_and_ranks", backend, _SCORES, logits)(logits, tokens)
