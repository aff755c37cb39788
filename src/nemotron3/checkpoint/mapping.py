"""Tensors that are views of their safetensors files, which are mapped into memory.

Nothing is copied: a page of the file is read from the disk, or found in the page cache, when it is
first used, and all processes that map the file share it. The mapping is private, so a write makes a
copy of the page in this process and never reaches the file or another mapping of it. A file that is
replaced by a rename, as `ShardedWriter` does, stays as it was for those who have it mapped; one
that is truncated or overwritten in place does not (docs/checkpoints.md).
"""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemotron3.checkpoint.files import DTYPES
from nemotron3.checkpoint.safetensors import ShardedReader


def mapped_tensors(reader: ShardedReader) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model directory, as a view of its file; a mapping lives as its views do.

    A tensor whose offset in the file is no multiple of its element's size is copied: PyTorch and
    compiled products read whole elements.
    """
    for file in dict.fromkeys(reader.info(name).file for name in reader.names):
        yield from _views(file)


def _views(file: Path) -> Iterator[tuple[str, Tensor]]:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
        memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        start = 8 + length + entry["data_offsets"][0]
        yield name, _view(memory, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def _view(memory: mmap.mmap, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    if start % dtype.itemsize:
        data = memory[start : start + count * dtype.itemsize]
        return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start).view(shape)
