"""Pages of memory: who holds which, and where each token of a sequence lies.

Keys and values of all sequences lie in pages of equal size. A page may belong to several holders
(sequences with one beginning, snapshots); it is written only while it has one, so whoever wants to
write into a shared page takes a copy first. Bookkeeping is in plain integers on the host; the
table that kernels read is a tensor that changes only when a sequence takes or leaves a page.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from nemotron3.errors import OverloadedError

_LINE = 64
"""Bytes of a cache line, across which no number should lie."""


def page_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for pages. In a computer's own memory they take none before they are written to.

    The pages of an engine are as many as might be wanted, and most of them never are.
    """
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _LINE, dtype=np.uint8))
    start = -memory.data_ptr() % _LINE
    return memory[start : start + size].view(dtype).view(*shape)


class PagePool:
    """Numbers of equal pages, counted by their holders.

    With a `count` the pool is that large and `take` fails beyond it; without, it grows.
    """

    def __init__(self, count: int | None = None) -> None:
        self.is_fixed = count is not None
        self._holders = [0] * (count or 0)
        self._free = list(range(len(self._holders)))[::-1]

    def __len__(self) -> int:
        return len(self._holders)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds; of a growing pool those that exist already."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """So many pages, held once; all or none."""
        missing = count - len(self._free)
        if missing > 0 and self.is_fixed:
            raise OverloadedError(
                f"{count} pages are wanted and {len(self._free)} of {len(self)} are free; free a "
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
        """One more holder for each."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is free and cannot be shared"
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each; the last one frees it."""
        for page in pages:
            assert self._holders[page] > 0, f"page {page} is released more often than it was held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """Whether someone else holds it too."""
        return self._holders[page] > 1


class PageTable:
    """Which pages each slot's tokens lie in, on the host and as a tensor for kernels.

    Token i of a slot lies at place i % page_size of page `rows[slot][i // page_size]`.
    """

    def __init__(self, slots: int, page_size: int, width: int, device: torch.device) -> None:
        self.page_size = page_size
        self.rows: list[list[int]] = [[] for _ in range(slots)]
        self.tensor = torch.zeros(slots, max(width, 1), dtype=torch.int64, device=device)

    @property
    def num_held(self) -> int:
        """Pages that any slot's tokens lie in."""
        return len({page for row in self.rows for page in row})

    def pages_for(self, tokens: int) -> int:
        """Pages that so many tokens fill or begin."""
        return -(-tokens // self.page_size)

    def set(self, slot: int, pages: Sequence[int]) -> None:
        """Give a slot these pages."""
        self.rows[slot] = list(pages)
        self._write(slot, 0)

    def extend(self, slot: int, pages: Sequence[int]) -> None:
        """Add pages behind those of a slot."""
        start = len(self.rows[slot])
        self.rows[slot] += pages
        self._write(slot, start)

    def replace(self, slot: int, place: int, page: int) -> None:
        """Put another page in one place."""
        self.rows[slot][place] = page
        self.tensor[slot, place] = page

    def positions(self, slot: int, start: int, end: int) -> Tensor:
        """Where tokens start to end - 1 lie in a pool seen as one row of tokens."""
        at = torch.arange(start, end, device=self.tensor.device)
        return self.tensor[slot, at // self.page_size] * self.page_size + at % self.page_size

    def _write(self, slot: int, start: int) -> None:
        row = self.rows[slot]
        if len(row) > self.tensor.shape[1]:
            wider = max(len(row), 2 * self.tensor.shape[1]) - self.tensor.shape[1]
            self.tensor = torch.nn.functional.pad(self.tensor, (0, wider))
        if len(row) > start:
            pages = torch.tensor(row[start:], device=self.tensor.device)
            self.tensor[slot, start : len(row)] = pages
