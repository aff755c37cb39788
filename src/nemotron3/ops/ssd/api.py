"""The door to the state-space scan."""

from jaxtyping import Float
from torch import Tensor

from nemotron3.ops.backends import Backend, resolve
from nemotron3.ops.segments import Segments
from nemotron3.ops.ssd.chunked import ssd_chunked
from nemotron3.ops.ssd.reference import ssd_reference
from nemotron3.ops.ssd.step import ssd_steps

_SCANS = {"reference": ssd_reference, "torch": ssd_chunked}
_FEW_TOKENS = 8
"""Up to this many new tokens per segment the recurrence beats a chunk (see ops/ssd/step.py)."""


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
    dtype, compute = x.dtype, dt.dtype
    x, B, C = x.to(compute), B.to(compute), C.to(compute)
    continues = initial_states is not None
    if initial_states is None:
        initial_states = x.new_zeros(len(segments), x.shape[1], x.shape[2], B.shape[2])
    uniform = segments.uniform_length
    if backend == "auto" and continues and uniform is not None and uniform <= _FEW_TOKENS:
        y, final = ssd_steps(
            x, dt, A, B, C, D, segments=segments, initial_states=initial_states.to(compute)
        )
    else:
        y, final = resolve("ssd", backend, _SCANS, x.device)(
            x,
            dt,
            A,
            B,
            C,
            D,
            segments=segments,
            initial_states=initial_states.to(compute),
            chunk_size=chunk_size,
        )
    return y.to(dtype), final
