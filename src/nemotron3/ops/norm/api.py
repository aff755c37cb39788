"""The entry point of the norms."""

from jaxtyping import Float
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.norm.reference import gated_group_norm_reference, rms_norm_reference
from nemotron3.ops.norm.torch import gated_group_norm_torch, rms_norm_torch

_NORMS = {
    "reference": rms_norm_reference,
    "torch": rms_norm_torch,
    "native": Kernel("nemotron3.ops.norm.native", "rms_norm_native"),
    "triton": Kernel("nemotron3.ops.norm.triton", "rms_norm_triton"),
}
_GATED_NORMS = {
    "reference": gated_group_norm_reference,
    "torch": gated_group_norm_torch,
    "native": Kernel("nemotron3.ops.norm.native", "gated_group_norm_native"),
    "triton": Kernel("nemotron3.ops.norm.triton", "gated_group_norm_triton"),
}


def rms_norm(
    x: Float[Tensor, "*batch d"],
    weight: Float[Tensor, " d"],
    eps: float,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*batch d"]:
    """Root-mean-square norm over the last axis, in float32 inside, in the dtype of `x` outside."""
    return resolve("rms_norm", backend, _NORMS, x)(x, weight, eps)


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
    return resolve("gated_group_norm", backend, _GATED_NORMS, x)(x, gate, weight, groups, eps)
