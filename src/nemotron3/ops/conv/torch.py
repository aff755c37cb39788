"""The short causal convolution as a sum of shifted copies of the whole stream.

With four taps a convolution is four multiply-adds over memory. PyTorch's convolution needs the
channels first, and its two transposes cost more than it gains. Each segment is preceded by its
state, so that no tap reaches into another segment.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.segments import Segments


def causal_conv_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments, conv_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve all segments at once; shapes as in `nemotron3.ops.conv.api.causal_conv`."""
    length = segments.uniform_length
    if length is not None:
        history = torch.cat([conv_states, x.unflatten(0, (len(segments), length))], dim=1)
        y = _taps(history, weight, bias, length).flatten(0, 1)
        return F.silu(y), history[:, length:]
    histories = [
        torch.cat([conv_state, part])
        for conv_state, part in zip(conv_states, x.split(segments.lengths), strict=True)
    ]
    outputs = [
        _taps(history, weight, bias, length)
        for history, length in zip(histories, segments.lengths, strict=True)
    ]
    new_conv_states = [h[n:] for h, n in zip(histories, segments.lengths, strict=True)]
    return F.silu(torch.cat(outputs)), torch.stack(new_conv_states)


def _taps(history: Tensor, weight: Tensor, bias: Tensor | None, length: int) -> Tensor:
    """Weighted sum of shifted copies of `history` [..., taps - 1 + length, channel]."""
    first = history[..., :length, :]
    y = first * weight[:, 0] if bias is None else torch.addcmul(bias, first, weight[:, 0])
    for tap in range(1, weight.shape[1]):
        y = torch.addcmul(y, history[..., tap : tap + length, :], weight[:, tap])
    return y
