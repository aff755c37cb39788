"""Memory for a model that was built on the meta device.

Models are built on the meta device, where a parameter has a shape and no bytes, and get memory when
their device and dtype are known. Parameters that are declared to stay in float32 (parameter.py) are
float32 for any dtype of the others.

On the CPU all parameters are in one block of memory, in the order of their modules, and large pages
are requested for it: a decoding step reads all active weights once, and with pages of 4 KiB a part
of its time is address translation.
"""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemotron3.models.parameter import DeclaredModule
from nemotron3.ops.weights import QuantizedWeight

_ALIGNMENT = 64
"""Alignment of every tensor in bytes: a cache line."""


class _Place(NamedTuple):
    """A tensor of a module that has no memory yet."""

    module: nn.Module
    name: str
    described: Tensor
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.described.numel() * self.dtype.itemsize


def allocate(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    cast_dtype: torch.dtype | None = None,
) -> None:
    """Give what is on the meta device memory, in its declared dtype (`ParameterSpec.dtype`)."""
    places = list(_places(model, dtype, cast_dtype))
    for place, fresh in zip(places, _empty(places, device), strict=True):
        if isinstance(place.described, nn.Parameter):
            setattr(place.module, place.name, nn.Parameter(fresh))
        else:
            # No published layout of a softmax router has this bias, so loading would not set it.
            place.module.register_buffer(place.name, fresh.zero_())


def large_pages(nbytes: int) -> mmap.mmap | bytearray:
    """`nbytes` bytes of value 0, in large pages if the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return bytearray(nbytes)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _places(
    model: nn.Module, dtype: torch.dtype, cast_dtype: torch.dtype | None
) -> Iterator[_Place]:
    for module in model.modules():
        specs = module.specs if isinstance(module, DeclaredModule) else {}
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in named:
            if not tensor.is_meta:
                continue
            kept = specs[name].dtype(dtype, cast_dtype) if name in specs else dtype
            if isinstance(module, QuantizedWeight):
                kept = tensor.dtype  # the number format's own
            yield _Place(module, name, tensor, kept)


def _empty(places: list[_Place], device: torch.device) -> Iterator[Tensor]:
    if device.type != "cpu":
        for place in places:
            yield torch.empty(place.described.shape, dtype=place.dtype, device=device)
        return
    sizes = [-(-place.nbytes // _ALIGNMENT) * _ALIGNMENT for place in places]
    memory = large_pages(max(sum(sizes), 1))
    for place, start in zip(places, accumulate(sizes, initial=0), strict=False):
        count = place.described.numel()
        part = torch.frombuffer(memory, dtype=place.dtype, offset=start, count=count)
        yield part.view(place.described.shape)
