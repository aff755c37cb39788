"""The short causal convolution, one output at a time.

y_t = SiLU(bias + sum_j weight_j x_{t - (K - 1) + j}), each channel by itself. The K - 1 inputs
before a segment's first token are those of its state, which is zero for a new sequence.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nemotron3.ops.segments import Segments


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments, conv_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Convolve each segment token by token; shapes as in `nemotron3.ops.conv.api.causal_conv`."""
    taps = weight.shape[1]
    outputs, new_conv_states = [], []
    for index, length in enumerate(segments.lengths):
        start = segments.starts[index]
        history = torch.cat(
            [conv_states[index], x[start : start + length]]
        )  # taps - 1 + length, channel
        for t in range(length):
            y = torch.einsum("kc,ck->c", history[t : t + taps], weight)
            outputs.append(F.silu(y if bias is None else y + bias))
        new_conv_states.append(history[length:])
    return torch.stack(outputs), torch.stack(new_conv_states)
