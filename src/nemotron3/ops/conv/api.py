"""The entry point of the causal convolution."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Kernel, choose, least_slot, load, resolve
from nemotron3.ops.checks import (
    check_axes,
    check_indices,
    check_intermediate_states,
    check_no_gradients,
    check_operand,
    check_pool,
    check_positive,
    check_segments,
    check_sequences,
    without_tokens,
)
from nemotron3.ops.conv.decode import causal_conv_steps_torch
from nemotron3.ops.conv.reference import causal_conv_reference
from nemotron3.ops.conv.torch import causal_conv_torch
from nemotron3.ops.segments import Segments


def _widened(conv: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`conv` with operands cast to float32 at least. Kernels cast as they read, without copies.

    Rounding after every tap causes a fifth of the total bfloat16 error of a stack of Mamba layers
    (docs/lab-notes/bf16.md).
    """

    def widened(
        x: Tensor, weight: Tensor, bias: Tensor | None, *, segments: Segments, conv_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = None if bias is None else bias.to(wide)
        y, new_conv_states = conv(
            x.to(wide), weight.to(wide), bias, segments=segments, conv_states=conv_states.to(wide)
        )
        return y.to(x.dtype), new_conv_states.to(x.dtype)

    return widened


_CONVOLUTIONS = {
    "reference": _widened(causal_conv_reference),
    "torch": _widened(causal_conv_torch),
    "native": Kernel("nemotron3.ops.conv.native", "causal_conv_native", native.FLOATS),
    "triton": Kernel("nemotron3.ops.conv.triton", "causal_conv_triton"),
}
_STEPS = {
    "torch": causal_conv_steps_torch,
    "native": Kernel("nemotron3.ops.conv.decode", "causal_conv_steps_native", native.FLOATS),
    "triton": Kernel("nemotron3.ops.conv.decode_triton", "causal_conv_steps_triton"),
}


def causal_conv(
    x: Float[Tensor, "tokens channel"],
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None,
    *,
    segments: Segments,
    conv_states: Float[Tensor, "segment tap-1 channel"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "tokens channel"], Float[Tensor, "segment tap-1 channel"]]:
    """Depthwise causal convolution and SiLU over packed sequences.

    `conv_states` holds the last `tap - 1` inputs before each segment; without it they are zero, as
    for new sequences. Returns the outputs and the states for the next call, both in the dtype of
    `x`. Taps are summed in float32 at least, whatever the dtype of the operands.
    """
    _check("conv", x, weight, bias)
    check_segments("conv", "segments", segments, len(x))
    shape = (len(segments), weight.shape[1] - 1, x.shape[1])
    if conv_states is None:
        conv_states = x.new_zeros(shape)
    check_operand("conv", "conv_states", conv_states, shape, x, same_dtype=False)
    conv_states = conv_states.to(x.dtype)
    if not len(x):
        return without_tokens(x, weight, bias), conv_states
    conv = resolve("conv", backend, _CONVOLUTIONS, x, weight, bias)
    return conv(x, weight, bias, segments=segments, conv_states=conv_states)


def causal_conv_steps(
    x: Float[Tensor, "tokens channel"],
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None,
    *,
    conv_states: Float[Tensor, "slot tap-1 channel"],
    slots: Int[Tensor, " sequence"],
    intermediate_states: Float[Tensor, "sequence step tap-1 channel"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "tokens channel"]:
    """The convolution of a decoding step: a few tokens of each sequence, the same number for each.

    Sequence i continues from row `slots[i]` of `conv_states`, which is updated in place. With
    `intermediate_states`, `conv_states` is not changed, and the state after each token is written
    there instead. There are no gradients.

    The GPU kernels treat a sequence in slot -1 as padding: its outputs are zero, and they read and
    write no memory for it.
    """
    name = "conv_steps"
    _check(name, x, weight, bias)
    check_no_gradients(name, x, weight, bias)
    check_axes(name, "conv_states", conv_states, "slot tap-1 channel")
    conv_state = (weight.shape[1] - 1, x.shape[1])
    check_operand(
        name, "conv_states", conv_states, (len(conv_states), *conv_state), x, same_dtype=False
    )
    check_pool(name, "conv_states", conv_states)
    rows, length = check_sequences(name, slots, len(x))
    chosen = choose(name, backend, _STEPS, x, weight, bias, conv_states)
    bounds = least_slot(chosen), len(conv_states)
    slots = check_indices(name, "slots", slots, (rows,), x, bounds)
    if not rows:
        return x.new_empty(x.shape)
    if intermediate_states is not None:
        check_intermediate_states(
            name, intermediate_states, (rows, length, *conv_state), conv_states
        )
    steps = load(_STEPS, chosen)
    return steps(
        x,
        weight,
        bias,
        conv_states=conv_states,
        slots=slots,
        intermediate_states=intermediate_states,
    )


def _check(operation: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_axes(operation, "x", x, "tokens channel")
    check_axes(operation, "weight", weight, "channel tap")
    channels, taps = x.shape[1], weight.shape[1]
    check_positive(operation, channels=channels, taps=taps)
    check_operand(operation, "weight", weight, (channels, taps), x, same_dtype=False)
    if bias is not None:
        check_operand(operation, "bias", bias, (channels,), x, same_dtype=False)
