"""The entry point for copying rows."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from nemotron3.errors import OperandError
from nemotron3.ops import native
from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.checks import check_device, check_indices, check_pool, check_shape
from nemotron3.ops.gather.reference import copy_rows_reference

_ROUTES = {
    "reference": copy_rows_reference,
    "torch": copy_rows_reference,
    "native": Kernel("nemotron3.ops.gather.native", "copy_rows_native", native.FLOATS),
}


def copy_rows(
    targets: Sequence[Tensor],
    to: Int[Tensor, " row"],
    sources: Sequence[Tensor],
    places: Int[Tensor, " row"],
    *,
    backend: Backend = "auto",
) -> None:
    """For each pair of tensors, copy row `places[i]` of the source to row `to[i]` of the target.

    All tensors are contiguous. A target has the dtype of its source and rows of the same shape. The
    indices in `to` are distinct. There are no gradients.
    """
    if len(targets) != len(sources):
        raise OperandError(f"copy_rows: {len(targets)} targets for {len(sources)} sources")
    if not targets:
        return
    first = targets[0]
    for target, source in zip(targets, sources, strict=True):
        for name, t in (("target", target), ("source", source)):
            check_device("copy_rows", name, t, first)
            check_pool("copy_rows", name, t)
            if t.dim() == 0:
                raise OperandError(f"copy_rows: a {name} has shape []; expected rows")
        check_shape("copy_rows", "source", source, (*source.shape[:1], *target.shape[1:]))
        if target.dtype != source.dtype:
            raise OperandError(
                f"copy_rows: a source has dtype {source.dtype} and its target {target.dtype}; "
                "expected the same"
            )
    if to.dim() != 1:
        raise OperandError(f"copy_rows: to has shape {list(to.shape)}; expected [row]")
    rows = [min(map(len, tensors)) for tensors in (targets, sources)]
    to = check_indices("copy_rows", "to", to, to.shape[:1], first, (0, rows[0]))
    places = check_indices("copy_rows", "places", places, to.shape, first, (0, rows[1]))
    if len(to):
        resolve("copy_rows", backend, _ROUTES, first)(targets, to, sources, places)
