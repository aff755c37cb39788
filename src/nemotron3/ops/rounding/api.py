"""The entry points of rounding: states that are computed in float32 and stored in fewer bits.

A state that is rounded to nearest after every token drifts. Where a decay changes the state by less
than half a step, rounding undoes the change every time, always in the same direction. Stochastic
rounding rounds up with a probability equal to the fraction of a step, so it is right on average and
errors grow like a random walk (Super report, section 4.3). Without `bits` the rounding is to
nearest, for comparison.
"""

import torch
from jaxtyping import Float, Float16, Float32, Int, Int8
from torch import Tensor

from nemotron3.errors import OperandError
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import (
    check_axes,
    check_device,
    check_integers,
    check_positive,
    check_shape,
)
from nemotron3.ops.rounding.bits import BLOCK, RandomBits
from nemotron3.ops.rounding.native import to_float16_native, to_int8_native
from nemotron3.ops.rounding.reference import (
    scales,
    spread,
    to_float16_reference,
    to_int8_reference,
)

_TO_FLOAT16 = {
    "reference": to_float16_reference,
    "torch": to_float16_reference,
    "native": to_float16_native,
    "triton": Kernel("nemotron3.ops.rounding.triton", "to_float16_triton"),
}
_TO_INT8 = {
    "reference": to_int8_reference,
    "torch": to_int8_reference,
    "native": to_int8_native,
    "triton": Kernel("nemotron3.ops.rounding.triton", "to_int8_triton"),
}
_LARGEST = 65504.0


def to_float16(
    x: Float[Tensor, "row ..."],
    positions: Int[Tensor, " row"],
    bits: RandomBits | None,
    *,
    backend: Backend = "auto",
) -> Float16[Tensor, "row ..."]:
    """States in float16, saturating; `positions` is the number of tokens that each has read."""
    if x.dim() < 2 or not x.is_floating_point():
        check_axes("to_float16", "x", x, "row element")
    positions = check_integers("to_float16", "positions", positions, x.shape[:1], x)
    if bits is None or not x.numel():
        return x.clamp(-_LARGEST, _LARGEST).half()
    flat = x.float().flatten(1).contiguous()
    round_ = resolve("to_float16", backend, _TO_FLOAT16, flat)
    return round_(flat, positions, bits).view(x.shape)


def to_int8(
    x: Float[Tensor, "row *unit d_state"],
    positions: Int[Tensor, " row"],
    bits: RandomBits | None,
    *,
    backend: Backend = "auto",
) -> tuple[Int8[Tensor, "row *unit d_state"], Float32[Tensor, "row *unit block"]]:
    """States as int8 codes, and the step of each block of 128 along the last axis.

    A value is its code times the step of its block; `positions` is as in `to_float16`.
    """
    if x.dim() < 3 or not x.is_floating_point():
        check_axes("to_int8", "x", x, "row unit d_state")
    check_positive("to_int8", d_state=x.shape[-1])
    positions = check_integers("to_int8", "positions", positions, x.shape[:1], x)
    flat = x.float().flatten(1, -2).contiguous()
    if bits is None or not x.numel():
        steps, inverse = scales(flat)
        codes = (flat * spread(inverse, x.shape[-1])).round().nan_to_num(0.0).to(torch.int8)
    else:
        codes, steps = resolve("to_int8", backend, _TO_INT8, flat)(flat, positions, bits)
    return codes.view(x.shape), steps.view(*x.shape[:-1], steps.shape[-1])


def from_int8(
    codes: Int8[Tensor, "*unit d_state"], steps: Float32[Tensor, "*unit block"]
) -> Float32[Tensor, "*unit d_state"]:
    """The states from the codes and steps of `to_int8`."""
    if codes.dim() == 0:
        raise OperandError("from_int8: codes has shape []; expected [unit, d_state]")
    blocks = -(-codes.shape[-1] // BLOCK)
    check_shape("from_int8", "steps", steps, (*codes.shape[:-1], blocks))
    check_device("from_int8", "steps", steps, codes)
    return codes.float() * spread(steps, codes.shape[-1])
