"""The convolution of a decoding step, which continues states in a pool.

The history of a sequence is its state (the last inputs) followed by its new tokens, and the state
after each token is a window of that history. Without `intermediate_states` the pool is updated;
with them the pool stays unchanged, and every window is written to them.
"""

from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.conv.torch import causal_conv_torch
from nemotron3.ops.kernels import contiguous_rows
from nemotron3.ops.native import FLOATS, ParallelKernel, name_of
from nemotron3.ops.segments import Segments

_SOURCE = Path(__file__).with_name("decode_native.cpp")
_steps = {
    dtypes: ParallelKernel(_SOURCE, f"conv_steps_{name_of(*dtypes)}", "ppppppp iiiiii")
    for dtypes in product(FLOATS, repeat=3)
    if dtypes[0] == torch.bfloat16 or dtypes[1] == torch.float32
}
"""By the dtypes of x, weight and states."""
_MAX_TAPS = 64


def causal_conv_steps_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_states: Tensor,
    slots: Tensor,
    intermediate_states: Tensor | None,
) -> Tensor:
    """Shapes as in `nemotron3.ops.conv.api.causal_conv_steps`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = len(slots)
    before = conv_states[slots]
    y, after = causal_conv_torch(
        x.to(wide),
        weight.to(wide),
        None if bias is None else bias.to(wide),
        segments=Segments.uniform(rows, len(x) // rows),
        conv_states=before.to(wide),
    )
    if intermediate_states is None:
        conv_states[slots] = after.to(conv_states.dtype)
    else:
        history = torch.cat([before, x.unflatten(0, (rows, -1)).to(conv_states.dtype)], dim=1)
        windows = history.unfold(1, conv_states.shape[1], 1)[:, 1:]  # row step channel tap
        intermediate_states.copy_(windows.transpose(2, 3))
    return y.to(x.dtype)


def causal_conv_steps_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    conv_states: Tensor,
    slots: Tensor,
    intermediate_states: Tensor | None,
) -> Tensor:
    """The same in C++ (see decode_native.cpp)."""
    (channels, taps), rows = weight.shape, len(slots)
    if taps > _MAX_TAPS:
        raise BackendUnavailableError(
            f"the native backend of 'conv_steps' takes {_MAX_TAPS} taps, not {taps}; use "
            "backend='torch'"
        )
    x, y = contiguous_rows(x), x.new_empty(x.shape)
    dtype = torch.promote_types(weight.dtype, x.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
        bias = bias.to(dtype).contiguous()
    weight = weight.to(dtype).contiguous()
    _steps[x.dtype, dtype, conv_states.dtype](
        x, weight, bias, conv_states, slots, intermediate_states, y, rows, len(x) // rows, taps,
        channels,
        x.stride(0), 0 if intermediate_states is None else intermediate_states.stride(0),
        work=x.numel() * taps,
    )  # fmt: skip
    return y
