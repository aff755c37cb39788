"""The entry points of the state-space scan."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, choose, least_slot, load, resolve
from nemotron3.ops.checks import (
    check_axes,
    check_divides,
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
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd.decode_torch import ssd_steps_torch
from nemotron3.ops.ssd.native import ssd_native, ssd_steps_native
from nemotron3.ops.ssd.rates import ssd_rates_native, ssd_rates_torch
from nemotron3.ops.ssd.reference import ssd_reference
from nemotron3.ops.ssd.torch import ssd_torch


def _widened(scan: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`scan` with operands cast to the dtype of `dt`. Kernels cast as they read, without copies.

    Compiled code reads operands that are bfloat16 as they are.
    """

    def widened(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        if x.dtype == dt.dtype == B.dtype == C.dtype:
            return scan(x, dt, A, B, C, D, **rest)
        y, final = scan(x.to(dt.dtype), dt, A, B.to(dt.dtype), C.to(dt.dtype), D, **rest)
        return y.to(x.dtype), final

    return widened


def _narrow_or_widened(scan: Callable[..., Any], widened: Callable[..., Any]) -> Callable[..., Any]:
    """`scan` for operands that are bfloat16, and `widened` for others."""

    def chosen(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **more: Any
    ) -> Any:
        is_narrow = x.dtype == B.dtype == C.dtype == torch.bfloat16
        return (scan if is_narrow else widened)(x, dt, A, B, C, *rest, **more)

    return chosen


_SCANS = {
    "reference": _widened(ssd_reference),
    "torch": _widened(ssd_torch),
    "native": _narrow_or_widened(ssd_native, _widened(ssd_native)),
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
    "native": _narrow_or_widened(ssd_steps_native, _widened_steps(ssd_steps_native)),
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

    Both are float32 at least, because they accumulate over the whole sequence.
    """
    check_axes("ssd_rates", "dt", dt, "tokens head")
    heads = dt.shape[1:]
    check_operand("ssd_rates", "dt_bias", dt_bias, heads, dt, same_dtype=False)
    check_operand("ssd_rates", "A_log", A_log, heads, dt, same_dtype=False)
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

    `dt` is the step size after softplus, and `A` is negative. Without `initial_states` every
    segment starts from zero. `A`, `D` and the states are cast to the dtype of `dt` (float32 in the
    model), whatever the dtype of `x`. The recurrence is in `reference.py`.
    """
    _check("ssd", x, dt, A, B, C, D)
    check_segments("ssd", "segments", segments, len(x))
    if chunk_size < 1:
        raise ValueError(f"ssd: chunk_size is {chunk_size}; expected 1 or more")
    shape = (len(segments), x.shape[1], x.shape[2], B.shape[2])
    if initial_states is None:
        initial_states = dt.new_zeros(shape)
    check_operand("ssd", "initial_states", initial_states, shape, x, same_dtype=False)
    initial_states, A, D = (t.to(dt.dtype) for t in (initial_states, A, D))
    if not len(x):
        return without_tokens(x, dt, A, B, C, D), initial_states
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
    """The scan of a decoding step: a few tokens of each sequence, the same number for each.

    Sequence i continues from row `slots[i]` of `ssm_states`, which is updated in place. With
    `intermediate_states`, `ssm_states` is not changed, and the state after each token is written
    there instead. There are no gradients.

    The GPU kernels treat a sequence in slot -1 as padding: its outputs are zero, and they read and
    write no memory for it.
    """
    name = "ssd_steps"
    _check(name, x, dt, A, B, C, D)
    check_no_gradients(name, x, dt, A, B, C, D, ssm_states)
    check_axes(name, "ssm_states", ssm_states, "slot head head_dim d_state")
    state = (*x.shape[1:], B.shape[2])
    check_operand(name, "ssm_states", ssm_states, (len(ssm_states), *state), x, same_dtype=False)
    check_pool(name, "ssm_states", ssm_states)
    rows, length = check_sequences(name, slots, len(x))
    chosen = choose(name, backend, _STEPS, dt, ssm_states)
    bounds = least_slot(chosen), len(ssm_states)
    slots = check_indices(name, "slots", slots, (rows,), x, bounds)
    if not rows:
        return x.new_empty(x.shape)
    if intermediate_states is not None:
        check_intermediate_states(name, intermediate_states, (rows, length, *state), ssm_states)
    A, D = A.to(dt.dtype), D.to(dt.dtype)
    steps = load(_STEPS, chosen)
    return steps(x, dt, A, B, C, D, ssm_states, slots, intermediate_states=intermediate_states)


def _check(
    operation: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
) -> None:
    check_axes(operation, "x", x, "tokens head head_dim")
    check_axes(operation, "B", B, "tokens group d_state")
    (tokens, heads, head_dim), (_, groups, d_state) = x.shape, B.shape
    check_positive(operation, heads=heads, head_dim=head_dim, d_state=d_state)
    check_divides(operation, "groups", groups, "heads", heads)
    for name, t, shape in (
        ("dt", dt, (tokens, heads)),
        ("A", A, (heads,)),
        ("B", B, (tokens, groups, d_state)),
        ("C", C, (tokens, groups, d_state)),
        ("D", D, (heads,)),
    ):
        check_operand(operation, name, t, shape, x, same_dtype=False)
