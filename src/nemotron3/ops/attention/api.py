"""The entry point of attention."""

from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.errors import OperandError, OperandIndexError
from nemotron3.ops import native
from nemotron3.ops.attention.decode_torch import attention_steps_torch
from nemotron3.ops.attention.reference import attention_reference
from nemotron3.ops.attention.torch import attention_torch
from nemotron3.ops.backends import Backend, Kernel, choose, least_slot, load, resolve
from nemotron3.ops.checks import (
    are_within,
    check_axes,
    check_divides,
    check_indices,
    check_integers,
    check_no_gradients,
    check_operand,
    check_pool,
    check_positive,
    check_segments,
    check_sequences,
    check_shape,
    without_tokens,
)
from nemotron3.ops.segments import Segments

_ATTENTIONS = {
    "reference": attention_reference,
    "torch": attention_torch,
    "native": Kernel("nemotron3.ops.attention.native", "attention_native", native.FLOATS),
}
_STEPS = {
    "torch": attention_steps_torch,
    "native": Kernel(
        "nemotron3.ops.attention.decode_native", "attention_steps_native", native.FLOATS
    ),
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

    `queries` and `keys` are the lengths of the same sequences in the two streams. A sequence may
    have more keys than queries: the extra keys come first and are those of earlier tokens, from a
    cache. Raises OperandError for shapes that do not fit, and for a sequence with fewer keys than
    queries.
    """
    _check_heads("attention", q, k, v)
    check_segments("attention", "queries", queries, len(q))
    check_segments("attention", "keys", keys, len(k))
    if queries is not keys:
        _check_order(queries, keys)
    if not len(q):
        return without_tokens(q, k, v)
    return resolve("attention", backend, _ATTENTIONS, q)(q, k, v, queries=queries, keys=keys)


def _check_heads(operation: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    check_axes(operation, "q", q, "tokens head head_dim")
    check_axes(operation, "k", k, "tokens kv_head head_dim")
    _, heads, head_dim = q.shape
    check_positive(operation, heads=heads, head_dim=head_dim)
    check_operand(operation, "k", k, (*k.shape[:2], head_dim), q)
    check_operand(operation, "v", v, k.shape, q)
    check_divides(operation, "kv_heads", k.shape[1], "heads", heads)


def _check_order(queries: Segments, keys: Segments) -> None:
    if len(queries) != len(keys):
        raise OperandError(
            f"attention: queries are {len(queries)} sequences and keys {len(keys)}; expected as "
            "many"
        )
    for i, (new, all_) in enumerate(zip(queries.lengths, keys.lengths, strict=True)):
        if new > all_:
            raise OperandError(
                f"attention: sequence {i} has {new} queries and {all_} keys; expected a key for "
                "each query at least"
            )


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
    """Attention of a decoding step: a few new tokens of each sequence, the same number for each.

    Sequence i has `cached_lengths[i]` tokens in the pages that row `slots[i]` of `table` lists. The
    new keys and values are written into these pages, after the cached ones, in place. No shape
    depends on the length of a sequence. The pages may have a narrower dtype than `q`; the caller
    keeps new keys and values within its range. There are no gradients.

    The GPU kernels treat a sequence in slot -1 as padding: its outputs are zero, and they read and
    write no memory for it. Raises OperandError for shapes that do not fit and, on the CPU,
    OperandIndexError for a slot, page or length out of range.
    """
    name = "attention_steps"
    _check_steps(name, q, k, v, keys, values)
    chosen = choose(name, backend, _STEPS, keys, q, values)
    table, slots, cached_lengths = _check_places(
        name, q, keys, table=table, slots=slots, cached_lengths=cached_lengths, backend=chosen
    )
    if not len(q):
        return q.new_empty(q.shape)
    steps = load(_STEPS, chosen)
    return steps(
        q, k, v, keys=keys, values=values, table=table, slots=slots, cached_lengths=cached_lengths
    )


def _check_steps(name: str, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
    _check_heads(name, q, k, v)
    check_shape(name, "k", k, (len(q), *k.shape[1:]))
    check_no_gradients(name, q, k, v)
    check_axes(name, "keys", keys, "page place kv_head head_dim")
    check_operand(name, "keys", keys, (*keys.shape[:2], *k.shape[1:]), q, same_dtype=False)
    check_operand(name, "values", values, keys.shape, keys)
    check_pool(name, "keys", keys)
    check_pool(name, "values", values)


def _check_places(
    name: str,
    q: Tensor,
    keys: Tensor,
    *,
    table: Tensor,
    slots: Tensor,
    cached_lengths: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked `table`, `slots` and `cached_lengths`, as the backends read them."""
    page_size = keys.shape[1]
    if table.dim() != 2:
        raise OperandError(f"{name}: table has shape {list(table.shape)}; expected [slot, pages]")
    table = check_integers(name, "table", table, table.shape, q)
    rows, steps = check_sequences(name, slots, len(q))
    slots = check_indices(name, "slots", slots, (rows,), q, (least_slot(backend), len(table)))
    most = table.shape[1] * page_size - steps
    hint = f": {table.shape[1]} pages of {page_size} tokens hold those and {steps} more"
    cached_lengths = check_indices(
        name, "cached_lengths", cached_lengths, (rows,), q, (0, most + 1), hint
    )
    if rows and q.is_cpu:
        _check_pages(table, slots, cached_lengths, steps, keys)
    return table, slots, cached_lengths


def _check_pages(
    table: Tensor, slots: Tensor, cached_lengths: Tensor, steps: int, keys: Tensor
) -> None:
    """Refuse pages that do not exist, up to the length of the longest sequence."""
    pages, page_size, *_ = keys.shape
    if are_within(table, (0, pages)):
        return
    of_sequences, longest = slots.numpy(), int(cached_lengths.numpy().max()) + steps
    used = table.numpy()[of_sequences[of_sequences >= 0], : -(-longest // page_size)]
    wrong = used[(used < 0) | (used >= pages)]
    if wrong.size:
        raise OperandIndexError(
            f"attention_steps: table holds page {wrong[0]}; expected values from 0 to {pages - 1}"
        )
