"""The entry point of the copying of rows."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from nemotron3.ops.backends import Backend, Kernel, resolve
from nemotron3.ops.gather.reference import copy_rows_reference

_ROUTES = {
    "reference": copy_rows_reference,
    "torch": copy_rows_reference,
    "native": Kernel("nemotron3.ops.gather.native", "copy_rows_native"),
}


def copy_rows(
    targets: Sequence[Tensor],
    to: Int[Tensor, " row"],
    sources: Sequence[Tensor],
    places: Int[Tensor, " row"],
    *,
    backend: Backend = "auto",
) -> None:
    """For each pair of tensors let row `to[i]` of the target be row `places[i]` of the source.

    All are contiguous, and a target has the dtype of its source and rows of its shape; no two of
    `to` are the same. Without gradients.
    """
    if targets:
        resolve("copy_rows", backend, _ROUTES, targets[0])(targets, to, sources, places)
