"""Batches as a pure function of the step.

    loader = Loader(corpus.train, schedule, seq_len=512, batch_size=32, seed=0)
    batch = loader.batch(step, rank=rank, world_size=world_size)

There is no iterator and no state to save: step -> sample numbers -> source and index in it (the
blend, `mixture.py`) -> window (a computed shuffle, `permutation.py`) -> tokens. So a run resumes
exactly, on any number of ranks, and any batch can be computed again.

*Windows.* A source is the concatenation of its documents, each followed by `</s>`, in the order of
the token file. Window w of an epoch holds tokens [start + w L, start + w L + L]: L inputs, and the
target of the last one. Adjacent windows share only that token. Every epoch draws a new start, at
most as large as the number of tokens that do not fill a window, and a new order of the windows.
Documents are not shuffled, because no sequence continues from one document to the next.

*Boundaries.* A batch is one packed stream. Each row and each document begins a segment (`lengths`),
and a model carries no state from one segment to the next. The target of a document's last token
(`</s>`) is the first token of the next document, which cannot be predicted from it: `loss_mask` is
0 there. The mask follows from the document bounds of the token file, not from ids, so it is right
for files from other tools too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemotron3.data.mixture import PhaseSchedule
from nemotron3.data.permutation import permute
from nemotron3.data.token_files import TokenFile
from nemotron3.errors import ConfigError, DataError

ORDER_FORMAT = 1
"""Version of the order; increased when the same files, blend and seed give a step other rows."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A packed stream of sequences, with targets and loss mask."""

    tokens: Tensor
    """Input ids, int64 [N]."""

    targets: Tensor
    """The id after each input in its document, int64 [N]."""

    loss_mask: Tensor
    """1 where the target counts, 0 where it belongs to another document, float32 [N]."""

    lengths: tuple[int, ...]
    """Lengths of the segments, which sum to N; the argument of `ops.segments.Segments`."""

    samples: Mapping[str, int]
    """Number of rows from each source in this batch."""

    @property
    def num_targets(self) -> int:
        """Number of targets that count."""
        return int(self.loss_mask.sum())

    def to(self, device: torch.device | str) -> "Batch":
        """A copy of the batch on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            loss_mask=self.loss_mask.to(device),
        )


class Windows:
    """The windows of one source in the shuffled order of its epochs."""

    def __init__(self, file: TokenFile, *, name: str, seq_len: int, seed: int) -> None:
        self.file = file
        self.name = name
        self._seq_len = seq_len
        self._seed = seed
        self.per_epoch, self._slack = divmod(file.num_tokens - 1, seq_len)
        if self.per_epoch < 1:
            raise DataError(
                f"source {name} has {file.num_tokens} tokens, a window needs {seq_len + 1}: "
                f"lower seq_len or give it more text"
            )

    def starts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first token of each sample's window."""
        epochs, places = np.divmod(samples, self.per_epoch)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            seed = (self._seed, self.name, epoch)
            offset = permute(np.zeros(1, np.int64), size=self._slack + 1, seed=(*seed, "offset"))
            window = permute(places[mask], size=self.per_epoch, seed=seed)
            starts[mask] = window * self._seq_len + offset
        return starts


class Loader:
    """Batches of `batch_size` rows of `seq_len` tokens, blended as the schedule says."""

    def __init__(
        self,
        files: Mapping[str, TokenFile],
        schedule: PhaseSchedule,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if seq_len <= 0 or batch_size <= 0:
            raise ConfigError(
                f"seq_len = {seq_len}, batch_size = {batch_size}: both must be positive"
            )
        missing = set(schedule.names) - set(files)
        if missing:
            raise ConfigError(
                f"no token file for {', '.join(sorted(missing))}; there are {', '.join(files)}"
            )
        self.schedule = schedule
        self.seq_len = seq_len
        self.batch_size = batch_size
        self._windows = [
            Windows(files[name], name=name, seq_len=seq_len, seed=seed) for name in schedule.names
        ]

    @property
    def num_steps(self) -> int:
        """Number of whole batches in the schedule."""
        return self.schedule.total_samples // self.batch_size

    def batch(
        self,
        step: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        microbatch: int = 0,
        num_microbatches: int = 1,
    ) -> Batch:
        """The rows of a step that belong to one rank and one of its microbatches.

        The step's rows are cut into world_size * num_microbatches equal runs. A rank's rows are
        contiguous, and its microbatches follow one another. So for any number of ranks and
        microbatches, the parts in this order give the same rows in the same order.
        """
        parts = world_size * num_microbatches
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size = {self.batch_size} does not divide into {world_size} ranks times "
                f"{num_microbatches} microbatches; make it a multiple of {parts}"
            )
        assert 0 <= rank < world_size
        assert 0 <= microbatch < num_microbatches
        rows = self.batch_size // parts
        first = step * self.batch_size + (rank * num_microbatches + microbatch) * rows
        return self.samples(first, rows)

    def samples(self, first: int, count: int) -> Batch:
        """The `count` samples from number `first` on, independent of the batch size."""
        source, index = self.schedule.source_and_index(np.arange(first, first + count))
        starts = np.empty_like(index)
        for number in np.unique(source).tolist():
            mask = source == number
            starts[mask] = self._windows[number].starts(index[mask])
        rows = [
            (self._windows[number].file, start, start + self.seq_len)
            for number, start in zip(source.tolist(), starts.tolist(), strict=True)
        ]
        counts = np.bincount(source, minlength=len(self._windows))
        return _pack(
            rows, {w.name: int(n) for w, n in zip(self._windows, counts, strict=True) if n}
        )


def held_out_starts(
    file: TokenFile, *, seq_len: int, max_rows: int | None = None
) -> NDArray[np.int64]:
    """The first tokens of the windows of `held_out_batches`."""
    starts = np.arange(0, file.num_tokens - 1, seq_len)
    if max_rows is None or len(starts) <= max_rows:
        return starts
    return starts[np.linspace(0, len(starts) - 1, max_rows).astype(np.int64)]


def held_out_batches(
    file: TokenFile, *, name: str, seq_len: int, batch_size: int, max_rows: int | None = None
) -> Iterator[Batch]:
    """Batches for evaluation: every window of a source once, in order, the last one shorter.

    With `max_rows`, only so many windows, at equal distances over the whole file.
    """
    starts = held_out_starts(file, seq_len=seq_len, max_rows=max_rows)
    for first in range(0, len(starts), batch_size):
        chunk = starts[first : first + batch_size].tolist()
        rows = [(file, start, min(start + seq_len, file.num_tokens - 1)) for start in chunk]
        yield _pack(rows, {name: len(rows)})


def _pack(rows: list[tuple[TokenFile, int, int]], samples: Mapping[str, int]) -> Batch:
    """Concatenate rows [start, end) of token files, with targets, mask and segment lengths."""
    total = sum(end - start for _, start, end in rows)
    tokens = np.empty(total, dtype=np.int64)
    targets = np.empty(total, dtype=np.int64)
    mask = np.ones(total, dtype=np.float32)
    cuts: list[NDArray[np.int64]] = []
    place = 0
    for file, start, end in rows:
        size = end - start
        window = file.tokens[start : end + 1]
        tokens[place : place + size] = window[:-1]
        targets[place : place + size] = window[1:]
        bounds = file.document_bounds
        low, high = np.searchsorted(bounds, [start + 1, end + 1])
        begins = bounds[low:high] - start  # documents that begin after the row's first token
        mask[place + begins - 1] = 0
        cuts.append(np.unique(np.concatenate(([0], begins[begins < size]))) + place)
        place += size
    lengths = np.diff(np.concatenate((*cuts, [total])))
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        loss_mask=torch.from_numpy(mask),
        lengths=tuple(lengths.tolist()),
        samples=samples,
    )
