"""Attention of a decoding step in C++ (see decode_native.cpp)."""

from itertools import product
from pathlib import Path

from torch import Tensor

from nemotron3.ops.native import FLOATS, ParallelKernel, name_of

_SOURCE = Path(__file__).with_name("decode_native.cpp")
_steps = {
    dtypes: ParallelKernel(_SOURCE, f"attention_steps_{name_of(*dtypes)}", "ppppppppp iiiiiiiiii")
    for dtypes in product(FLOATS, repeat=2)
}
"""By the dtypes of the queries and of the cache."""


def attention_steps_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    slots: Tensor,
    cached_lengths: Tensor,
) -> Tensor:
    """Shapes as in `nemotron3.ops.attention.api.attention_steps`."""
    tokens, heads, head_dim = q.shape
    q, k, v = (t if t.stride()[1:] == (head_dim, 1) else t.contiguous() for t in (q, k, v))
    y = q.new_empty(q.shape)
    sizes = (len(slots), tokens // len(slots), heads, k.shape[1], head_dim, keys.shape[1])
    strides = (table.shape[1], q.stride(0), k.stride(0), v.stride(0))
    work = table.shape[1] * keys[0].numel() * tokens  # for sequences as long as the table allows
    steps = _steps[q.dtype, keys.dtype]
    steps(q, k, v, keys, values, table, slots, cached_lengths, y, *sizes, *strides, work=work)
    return y
