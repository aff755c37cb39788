"""The door to the causal convolution."""

from jaxtyping import Float
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.conv.reference import causal_conv_reference
from nemotron3.ops.conv.shifted import causal_conv_shifted
from nemotron3.ops.segments import Segments

_CONVOLUTIONS = {
    "reference": causal_conv_reference,
    "torch": causal_conv_shifted,
    "triton": Kernel("nemotron3.ops.conv.triton", "causal_conv_triton"),
}


def causal_conv(
    x: Float[Tensor, "tokens channel"],
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None,
    *,
    segments: Segments,
    tails: Float[Tensor, "segment tap-1 channel"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "tokens channel"], Float[Tensor, "segment tap-1 channel"]]:
    """Depthwise causal convolution and SiLU over packed sequences.

    `tails` holds the last `tap - 1` inputs before each segment (zeros where omitted: new
    sequences). Returns the outputs and the tails to hand to the next call.
    """
    if tails is None:
        tails = x.new_zeros(len(segments), weight.shape[1] - 1, x.shape[1])
    return resolve("conv", backend, _CONVOLUTIONS, x)(
        x, weight, bias, segments=segments, tails=tails.to(x.dtype)
    )
