"""Copying rows, tensor by tensor."""

from collections.abc import Sequence

from torch import Tensor


def copy_rows_reference(
    targets: Sequence[Tensor], to: Tensor, sources: Sequence[Tensor], places: Tensor
) -> None:
    """As `nemotron3.ops.gather.api.copy_rows`."""
    for target, source in zip(targets, sources, strict=True):
        target.index_copy_(0, to, source.index_select(0, places))
