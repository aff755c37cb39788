"""The entry point of attention."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.attention.decode_torch import attention_steps_torch
from nemotron3.ops.attention.reference import attention_reference
from nemotron3.ops.attention.torch import attention_torch
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.segments import Segments

_ATTENTIONS = {
    "reference": attention_reference,
    "torch": attention_torch,
    "native": Kernel("nemotron3.ops.attention.native", "attention_native"),
}
_STEPS = {
    "torch": attention_steps_torch,
    "native": Kernel("nemotron3.ops.attention.decode_native", "attention_steps_native"),
    "triton": Kernel("nemotron3.ops.attention.decode_triton", "attention_steps_triton"),
}


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


def attention_steps(
    q: Float[Tensor, "tokens head head_dim"],
    k: Float[Tensor, "tokens kv_head head_dim"],
    v: Float[Tensor, "tokens kv_head head_dim"],
    *,
    keys: Float[Tensor, "page place kv_head head_dim"],
    values: Float[Tensor, "page place kv_head head_dim"],
    table: Int[Tensor, "slot pages"],
    slots: Int[Tensor, " sequence"],
    cached_lengths: Int[Tensor, " sequence"],
    backend: Backend = "auto",
) -> Float[Tensor, "tokens head head_dim"]:
    """The same for the same few new tokens of each sequence, without gradients.

    Sequence i has `cached_lengths[i]` tokens in the pages that row `slots[i]` of `table` lists; the
    new ones are written behind them, in place. No shape depends on how long a sequence is. Keys and
    values may be kept in fewer bits than those of `q`; new ones are then within their range.

    The kernels on a GPU take a sequence in slot -1 for padding: its outputs are zero, and no
    memory is touched for it.
    """
    steps = resolve("attention_steps", backend, _STEPS, keys)
    return steps(
        q, k, v, keys=keys, values=values, table=table, slots=slots, cached_lengths=cached_lengths
    )
