"""The entry point of the state-space scan."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd.decode_torch import ssd_steps_torch
from nemotron3.ops.ssd.native import ssd_native, ssd_steps_native
from nemotron3.ops.ssd.rates import ssd_rates_native, ssd_rates_torch
from nemotron3.ops.ssd.reference import ssd_reference
from nemotron3.ops.ssd.torch import ssd_torch


def _widened(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`scan` in the dtype of its steps; kernels widen operands as they read, and need no copies."""

    def widened(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        if x.dtype == dt.dtype == B.dtype == C.dtype:
            return scan(x, dt, A, B, C, D, **rest)
        y, final = scan(x.to(dt.dtype), dt, A, B.to(dt.dtype), C.to(dt.dtype), D, **rest)
        return y.to(x.dtype), final

    return widened


_SCANS = {
    "reference": _widened(ssd_reference),
    "torch": _widened(ssd_torch),
    "native": _widened(ssd_native),
    "triton": Kernel("nemotron3.ops.ssd.triton", "ssd_triton"),
}


def _widened_steps(steps: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *rest: Any, **more: Any
    ) -> Tensor:
        if x.dtype == dt.dtype == B.dtype == C.dtype:
            return steps(x, dt, A, B, C, D, *rest, **more)
        y = steps(x.to(dt.dtype), dt, A, B.to(dt.dtype), C.to(dt.dtype), D, *rest, **more)
        return y.to(x.dtype)

    return widened


_STEPS = {
    "torch": ssd_steps_torch,
    "native": _widened_steps(ssd_steps_native),
    "triton": Kernel("nemotron3.ops.ssd.decode_triton", "ssd_steps_triton"),
}

_RATES = {"reference": ssd_rates_torch, "torch": ssd_rates_torch, "native": ssd_rates_native}


def ssd_rates(
    dt: Float[Tensor, "tokens head"],
    dt_bias: Float[Tensor, " head"],
    A_log: Float[Tensor, " head"],
    *,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "tokens head"], Float[Tensor, " head"]]:
    """Step sizes softplus(dt + dt_bias) and decay rates -e^A_log: `dt` and `A` of the scan.

    In float32 at least: they accumulate over the whole sequence.
    """
    wide = torch.promote_types(dt.dtype, torch.float32)
    dt, dt_bias, A_log = dt.to(wide), dt_bias.to(wide), A_log.to(wide)
    return resolve("ssd_rates", backend, _RATES, dt)(dt, dt_bias, A_log)


def ssd(
    x: Float[Tensor, "tokens head head_dim"],
    dt: Float[Tensor, "tokens head"],
    A: Float[Tensor, " head"],
    B: Float[Tensor, "tokens group d_state"],
    C: Float[Tensor, "tokens group d_state"],
    D: Float[Tensor, " head"],
    *,
    segments: Segments,
    chunk_size: int,
    initial_states: Float[Tensor, "segment head head_dim d_state"] | None = None,
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "tokens head head_dim"], Float[Tensor, "segment head head_dim d_state"]]:
    """Mamba-2's selective scan over packed sequences; returns the outputs and each final state.

    `dt` is the step after softplus, `A` is negative. Without `initial_states` every segment starts
    from zero. States are kept in the dtype of `dt` (float32 in the model), whatever that of `x` is.
    """
    if initial_states is None:
        initial_states = dt.new_zeros(len(segments), x.shape[1], x.shape[2], B.shape[2])
    initial_states = initial_states.to(dt.dtype)
    scan = resolve("ssd", backend, _SCANS, dt)
    return scan(
        x, dt, A, B, C, D,
        segments=segments, initial_states=initial_states, chunk_size=chunk_size,
    )  # fmt: skip


def ssd_steps(
    x: Float[Tensor, "tokens head head_dim"],
    dt: Float[Tensor, "tokens head"],
    A: Float[Tensor, " head"],
    B: Float[Tensor, "tokens group d_state"],
    C: Float[Tensor, "tokens group d_state"],
    D: Float[Tensor, " head"],
    ssm_states: Float[Tensor, "slot head head_dim d_state"],
    slots: Int[Tensor, " sequence"],
    *,
    intermediate_states: Float[Tensor, "sequence step head head_dim d_state"] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "tokens head head_dim"]:
    """The same for the same few tokens of each sequence, without gradients.

    Sequence i goes on from row `slots[i]` of `ssm_states`, which is written in place. With
    `intermediate_states` they stay as they are, and what they would be after each token goes there.

    The kernels on a GPU take a sequence in slot -1 for padding: its outputs are zero, and no
    memory is touched for it.
    """
    steps = resolve("ssd_steps", backend, _STEPS, dt)
    return steps(x, dt, A, B, C, D, ssm_states, slots, intermediate_states=intermediate_states)
