"""The convolution for a few tokens behind tails that lie in a pool.

The history of a sequence is its tail and its new tokens; the tail after each token is a window of
that. Without a trail the pool goes on; with one it stays, and the trail gets every window.
"""

from pathlib import Path

import torch
from torch import Tensor

from nemotron3.errors import BackendUnavailableError
from nemotron3.ops.conv.shifted import causal_conv_shifted
from nemotron3.ops.native import TeamFunction, contiguous_rows
from nemotron3.ops.segments import Segments

_steps = TeamFunction(Path(__file__).with_name("steps.cpp"), "conv_steps", "ppppppp iiiiii")
_MOST_TAPS = 64


def causal_conv_steps_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    tails: Tensor,
    slots: Tensor,
    trail: Tensor | None,
) -> Tensor:
    """Shapes as in `nemotron3.ops.conv.api.causal_conv_steps`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = len(slots)
    before = tails[slots]
    y, after = causal_conv_shifted(
        x.to(wide),
        weight.to(wide),
        None if bias is None else bias.to(wide),
        segments=Segments.uniform(rows, len(x) // rows),
        tails=before.to(wide),
    )
    if trail is None:
        tails[slots] = after.to(tails.dtype)
    else:
        history = torch.cat([before, x.unflatten(0, (rows, -1)).to(tails.dtype)], dim=1)
        windows = history.unfold(1, tails.shape[1], 1)[:, 1:]  # row step channel tail
        trail.copy_(windows.transpose(2, 3))
    return y.to(x.dtype)


def causal_conv_steps_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    tails: Tensor,
    slots: Tensor,
    trail: Tensor | None,
) -> Tensor:
    """The same in C++ (steps.cpp says how)."""
    (channels, taps), rows = weight.shape, len(slots)
    if taps > _MOST_TAPS:
        raise BackendUnavailableError(
            f"the native backend of 'conv_steps' takes {_MOST_TAPS} taps, not {taps}; use "
            "backend='torch'"
        )
    x, y = contiguous_rows(x), x.new_empty(x.shape)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    _steps(
        x, weight, bias, tails, slots, trail, y, rows, len(x) // rows, taps, channels,
        x.stride(0), 0 if trail is None else trail.stride(0), work=x.numel() * taps,
    )  # fmt: skip
    return y
