"""The door to attention."""

from jaxtyping import Float
from torch import Tensor

from nemotron3.ops.attention.reference import attention_reference
from nemotron3.ops.attention.sdpa import attention_sdpa
from nemotron3.ops.backends import Backend, resolve
from nemotron3.ops.segments import Segments

_ATTENTIONS = {"reference": attention_reference, "torch": attention_sdpa}


def attention(
    q: Float[Tensor, "queries head head_dim"],
    k: Float[Tensor, "keys kv_head head_dim"],
    v: Float[Tensor, "keys kv_head head_dim"],
    *,
    queries: Segments,
    keys: Segments,
    backend: Backend = "auto",
) -> Float[Tensor, "queries head head_dim"]:
    """Causal attention within each sequence, scaled by head_dim^-0.5.

    `queries` and `keys` cut their streams into the same number of sequences. Where a sequence has
    more keys than queries, the extra keys come first: they are what a cache remembers.
    """
    return resolve("attention", backend, _ATTENTIONS, q)(q, k, v, queries=queries, keys=keys)
