"""Writing a model directory of which only the plan fits into memory.

`ShardedWriter` holds the tensors of a shard until it is full. Where shapes and dtypes are known
beforehand, every tensor has its place in its file, and is written there when it is computed, in any
order: of the model no more than that tensor is in memory.

    plan = {"a": torch.empty(2, 3, device="meta"), "b": torch.empty(4, device="meta")}
    with PlannedWriter(directory, plan) as writer:
        writer.add("b", torch.zeros(4))
        writer.add("a", torch.ones(2, 3))
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, NamedTuple

from torch import Tensor

from nemotron3.checkpoint.files import full_disk_named, tensor_bytes, tensor_header
from nemotron3.checkpoint.safetensors import ShardedWriter
from nemotron3.errors import CheckpointError


class _Place(NamedTuple):
    file: IO[bytes]
    offset: int


class PlannedWriter(ShardedWriter):
    """Writes tensors of known shapes and dtypes as they come."""

    def __init__(
        self,
        directory: Path | str,
        plan: Mapping[str, Tensor],
        *,
        max_shard_bytes: int = 5_000_000_000,
    ) -> None:
        """`plan` has the tensors by name, in the order of their shards; they may be on meta.

        Raises StorageError at once if the disk is too small.
        """
        total = sum(tensor.nbytes for tensor in plan.values())
        super().__init__(directory, max_shard_bytes=max_shard_bytes, total_bytes=total)
        self._plan = dict(plan)
        self._total_bytes = total
        self._files: list[IO[bytes]] = []
        self._places: dict[str, _Place] = {}
        try:
            with full_disk_named(self.directory, self._needed_bytes):
                for names in self._divided():
                    self._begin_shard(names)
        except BaseException:
            self.discard()
            raise

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor into its place; the order of calls does not matter."""
        self._check_new(name)
        planned = self._plan.get(name)
        if planned is None or (planned.shape, planned.dtype) != (tensor.shape, tensor.dtype):
            expected = "none" if planned is None else f"{tuple(planned.shape)} {planned.dtype}"
            raise CheckpointError(
                f"tensor {name!r} is {tuple(tensor.shape)} {tensor.dtype}, and the plan of "
                f"{self.directory} has {expected} of this name"
            )
        self._names.add(name)
        place = self._places[name]
        with full_disk_named(self.directory, self._needed_bytes):
            place.file.seek(place.offset)
            place.file.write(tensor_bytes(tensor))

    def finish(self) -> None:
        """Give all files their final names; CheckpointError if a tensor is missing."""
        missing = [name for name in self._plan if name not in self._names]
        if missing:
            raise CheckpointError(
                f"{self.directory} lacks {len(missing)} tensors of its plan, first {missing[0]!r}; "
                "add every tensor before the writer is finished"
            )
        with full_disk_named(self.directory, self._needed_bytes):
            for file in self._files:
                file.flush()
                os.fsync(file.fileno())
        super().finish()

    def discard(self) -> None:
        """Close and remove the temporary files; files under final names are unchanged."""
        for file in self._files:
            file.close()
        super().discard()

    def _divided(self) -> list[list[str]]:
        """The names of each shard."""
        shards: list[list[str]] = [[]]
        held = 0
        for name, tensor in self._plan.items():
            if shards[-1] and held + tensor.nbytes > self.max_shard_bytes:
                shards.append([])
                held = 0
            shards[-1].append(name)
            held += tensor.nbytes
        return shards

    def _begin_shard(self, names: list[str]) -> None:
        header, places = tensor_header({name: self._plan[name] for name in names})
        file = self._temporary(len(self._files)).open("wb")
        self._files.append(file)
        self._shards.append(names)
        file.write(header)
        # The whole length, so that the last tensor may be an empty one.
        file.truncate(len(header) + sum(self._plan[name].nbytes for name in names))
        self._places |= {name: _Place(file, offset) for name, offset in places.items()}
