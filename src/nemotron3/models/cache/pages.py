"""Pages of keys and values: reference counts, and the page table.

Keys and values of all sequences are in pages of equal size. Several sequences with the same prefix,
and snapshots, may share a page. A page is written only while its reference count is one, so a
shared page is copied before a write. Reference counts are plain integers on the host; the page
table, which kernels read, is a tensor that changes only when a sequence gains or loses a page.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from nemotron3.errors import OverloadedError

_LINE = 64
"""Bytes of a cache line: pages begin at a multiple of it."""


def page_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for pages. In host memory, pages that were never written take no physical memory.

    An engine has pages for its largest load, and most of them may never be used.
    """
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _LINE, dtype=np.uint8))
    start = -memory.data_ptr() % _LINE
    return memory[start : start + size].view(dtype).view(*shape)


class PagePool:
    """The page numbers and their reference counts.

    With a `count` the pool has that many pages, and `take` fails beyond it; without, it grows.
    """

    def __init__(self, count: int | None = None) -> None:
        self.is_fixed = count is not None
        self._holders = [0] * (count or 0)
        self._free = list(range(len(self._holders)))[::-1]

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """Pages with reference count 0; in a growing pool, of those that exist already."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Allocate `count` pages with reference count 1, all or none."""
        missing = count - len(self._free)
        if missing > 0 and self.is_fixed:
            raise OverloadedError(
                f"{count} pages are needed and {len(self._free)} of {len(self)} are free; free a "
                "sequence or a snapshot first, or make the cache with more pages"
            )
        if missing > 0:
            have = len(self._holders)
            more = max(missing, have)
            self._holders += [0] * more
            self._free = [*range(have + more - 1, have - 1, -1), *self._free]
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Increment the reference count of each page."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free and cannot be shared"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Decrement the reference count of each page; at 0 it is free."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is released more often than it was held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether the reference count is above 1."""
        return self._holders[page] > 1


class PageTable:
    """The pages of each slot, on the host and as a tensor for kernels.

    Token i of a slot is at place i % page_size of page `rows[slot][i // page_size]`.
    """

    def __init__(self, slots: int, page_size: int, width: int, device: torch.device) -> None:
        self.page_size = page_size
        self.rows: list[list[int]] = [[] for _ in range(slots)]
        self.tensor = torch.zeros(slots, max(width, 1), dtype=torch.int64, device=device)

    @property
    def num_held(self) -> int:
        """Number of pages that slots use."""
        return len({page for row in self.rows for page in row})

    def pages_for(self, tokens: int) -> int:
        """Number of pages for this number of tokens."""
        return -(-tokens // self.page_size)

    def set(self, slot: int, pages: Sequence[int]) -> None:
        """Set the pages of a slot."""
        self.rows[slot] = list(pages)
        self._write(slot, 0)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Append pages to those of a slot."""
        start = len(self.rows[slot])
        self.rows[slot] += pages
        self._write(slot, start)

    def replace(self, slot: int, place: int, page: int) -> None:
        """Replace one page of a slot."""
        self.rows[slot][place] = page
        self.tensor[slot, place] = page

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """Indices of the tokens at these positions of these slots, in the pages flattened to one
        axis of tokens; the two broadcast."""
        pages = self.tensor[slots, positions // self.page_size]
        return pages * self.page_size + positions % self.page_size

    def _write(self, slot: int, start: int) -> None:
        row = self.rows[slot]
        if len(row) > self.tensor.shape[1]:
            wider = max(len(row), 2 * self.tensor.shape[1]) - self.tensor.shape[1]
            self.tensor = torch.nn.functional.pad(self.tensor, (0, wider))
        if len(row) > start:
            pages = torch.tensor(row[start:], device=self.tensor.device)
            self.tensor[slot, start : len(row)] = pages
