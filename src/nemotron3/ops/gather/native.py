"""Copying rows of many tensors in one C++ call, where PyTorch would need one call per tensor."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemotron3.ops.native import ParallelKernel

_copy_rows = ParallelKernel(Path(__file__).with_name("native.cpp"), "copy_rows", "pppii")


def copy_rows_native(
    targets: Sequence[Tensor], to: Tensor, sources: Sequence[Tensor], places: Tensor
) -> None:
    """As `nemotron3.ops.gather.api.copy_rows`."""
    pairs: list[tuple[int, int, int]] = []
    for target, source in zip(targets, sources, strict=True):
        row_bytes = target.nbytes // len(target)
        pairs.append((target.data_ptr(), source.data_ptr(), row_bytes))
    work = len(to) * sum(row_bytes for *_, row_bytes in pairs)
    _copy_rows(torch.tensor(pairs), to, places, len(pairs), len(to), work=work)
