"""Batches of packed conversations as a pure function of the step.

    loader = PackedLoader(sources, seq_len=2048, batch_size=8, seed=0)
    batch = loader.batch(step, microbatch=0, num_microbatches=2)

Like the pre-training loader, it has no state to save: an epoch's order, packing and shuffle follow
from the seed. A row holds whole conversations, at most `seq_len` tokens. Each conversation is a
segment of its own, so a model carries no state from one to the next. Batches continue across
epochs, and no conversation is dropped at an epoch's end. A source of which an epoch has a part goes
on in the next one where it was, so each of its conversations comes equally often in the long run.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nemotron3.data.chat_tokens import TokenizedConversation
from nemotron3.data.loader import Batch
from nemotron3.data.packing import pack_best_fit
from nemotron3.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class PackedSource:
    """Conversations of one source."""

    conversations: Sequence[TokenizedConversation]
    weight: float = 1.0
    """How often an epoch contains each of them; a part of them in turns, so that all come."""


class PackedLoader:
    """Rows of packed conversations, batch by batch."""

    def __init__(
        self,
        sources: Mapping[str, PackedSource],
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
    ) -> None:
        """Raises DataError if no conversation fits in a row."""
        if seq_len < 1 or batch_size < 1:
            raise ConfigError(
                f"seq_len = {seq_len}, batch_size = {batch_size}: both must be 1 or more"
            )
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self._sources = {
            name: [c for c in source.conversations if 0 < len(c) <= seq_len]
            for name, source in sources.items()
        }
        self._weights = {name: source.weight for name, source in sources.items()}
        self.num_too_long = {
            name: len(source.conversations) - len(self._sources[name])
            for name, source in sources.items()
        }
        """Number of conversations of each source that do not fit in a row; they are left out."""
        for name, kept in self._sources.items():
            if not kept:
                raise DataError(
                    f"source {name} has {len(sources[name].conversations)} conversations, and none "
                    f"fits into {seq_len} tokens; raise training.seq_len"
                )
        expected = sum(self._weights[name] * len(kept) for name, kept in self._sources.items())
        self._scale = max(1, math.ceil(1 / expected))  # an epoch of tiny weights has something, too
        self._epochs: list[_Epoch] = []

    def rows_of_epoch(self, epoch: int = 0) -> int:
        """Number of rows into which an epoch's conversations are packed."""
        return len(self._epoch(epoch).rows)

    def batch(self, step: int, *, microbatch: int = 0, num_microbatches: int = 1) -> Batch:
        """A microbatch of the update that follows `step` updates."""
        rows, rest = divmod(self._batch_size, num_microbatches)
        assert rest == 0
        assert 0 <= microbatch < num_microbatches
        first = step * self._batch_size + microbatch * rows
        picked = [item for row in range(first, first + rows) for item in self._row(row)]
        return collate(picked)

    def _row(self, row: int) -> Sequence[tuple[str, TokenizedConversation]]:
        epoch = 0
        while row >= (count := self.rows_of_epoch(epoch)):
            row -= count
            epoch += 1
        found = self._epoch(epoch)
        return [found.items[index] for index in found.rows[row]]

    def _epoch(self, epoch: int) -> "_Epoch":
        while len(self._epochs) <= epoch:
            self._epochs.append(self._packed(len(self._epochs)))
        return self._epochs[epoch]

    def _packed(self, epoch: int) -> "_Epoch":
        chance = random.Random(f"packing {self._seed} {epoch}")
        items: list[tuple[str, TokenizedConversation]] = []
        for name, kept in self._sources.items():
            start, end = (self._taken(name, epochs) for epochs in (epoch, epoch + 1))
            items += [(name, kept[index]) for index in self._between(name, start, end)]
        chance.shuffle(items)
        rows = pack_best_fit([len(conversation) for _, conversation in items], self._seq_len)
        chance.shuffle(rows)
        return _Epoch(items, rows)

    def _taken(self, name: str, epochs: int) -> int:
        """How many conversations of a source so many epochs have; what rounding adds is carried."""
        exact = self._weights[name] * len(self._sources[name]) * self._scale * epochs
        return math.ceil(round(exact, 6))

    def _between(self, name: str, start: int, end: int) -> Iterator[int]:
        """A part of an endless series of passes through a source, each in a random order."""
        count = len(self._sources[name])
        for number in range(start // count, -(-end // count)):
            order = list(range(count))
            random.Random(f"pass {self._seed} {name} {number}").shuffle(order)
            first = number * count
            yield from sorted(order[max(start - first, 0) : end - first])


@dataclass(frozen=True)
class _Epoch:
    items: list[tuple[str, TokenizedConversation]]
    rows: list[list[int]]


def collate(items: Sequence[tuple[str, TokenizedConversation]]) -> Batch:
    """Join conversations, given with the names of their sources, into one packed stream."""
    ids = [conversation.ids for _, conversation in items]
    samples: dict[str, int] = {}
    for name, _ in items:
        samples[name] = samples.get(name, 0) + 1
    mask = np.concatenate([conversation.is_target[1:] for _, conversation in items])
    return Batch(
        tokens=torch.from_numpy(np.concatenate([i[:-1] for i in ids])).long(),
        targets=torch.from_numpy(np.concatenate([i[1:] for i in ids])).long(),
        loss_mask=torch.from_numpy(mask).float(),
        lengths=tuple(len(conversation) for _, conversation in items),
        samples=samples,
    )
