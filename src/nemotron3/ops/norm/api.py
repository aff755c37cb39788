"""The entry points of the norms."""

from jaxtyping import Float
from torch import Tensor

from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_axes, check_divides, check_operand, check_positive
from nemotron3.ops.norm.reference import gated_group_norm_reference, rms_norm_reference
from nemotron3.ops.norm.torch import gated_group_norm_torch, rms_norm_torch

_NORMS = {
    "reference": rms_norm_reference,
    "torch": rms_norm_torch,
    "native": Kernel("nemotron3.ops.norm.native", "rms_norm_native", native.FLOATS),
    "triton": Kernel("nemotron3.ops.norm.triton", "rms_norm_triton"),
}
_GATED_NORMS = {
    "reference": gated_group_norm_reference,
    "torch": gated_group_norm_torch,
    "native": Kernel("nemotron3.ops.norm.native", "gated_group_norm_native", native.FLOATS),
    "triton": Kernel("nemotron3.ops.norm.triton", "gated_group_norm_triton"),
}


def rms_norm(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    eps: float,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch d"]:
    """Root-mean-square norm over the last axis, computed in float32, in the dtype of `x`."""
    _check("rms_norm", x, weight)
    return resolve("rms_norm", backend, _NORMS, x, weight)(x, weight, eps)


def gated_group_norm(
    x: Float[Tensor, "*batch d"],
    gate: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    *,
    groups: int,
    eps: float,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch d"]:
    """RMS norm of `x * SiLU(gate)` within each of `groups` equal parts of the last axis."""
    _check("gated_group_norm", x, weight)
    check_operand("gated_group_norm", "gate", gate, x.shape, x, same_dtype=False)
    check_divides("gated_group_norm", "groups", groups, "columns", x.shape[-1])
    norm = resolve("gated_group_norm", backend, _GATED_NORMS, x, gate, weight)
    return norm(x, gate, weight, groups, eps)


def _check(operation: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        check_axes(operation, "x", x, "tokens d")
    check_positive(operation, columns=x.shape[-1])
    check_operand(operation, "weight", weight, x.shape[-1:], x, same_dtype=False)
