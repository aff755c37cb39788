"""Directories of safetensors in the published layout, read and written shard by shard.

A model is `model.safetensors`, or `model-00001-of-000NN.safetensors` with an index that names the
shard of each tensor. Neither reading nor writing needs more than one shard of memory besides the
model: the reader maps one file at a time, and the writer closes a shard when it is full.

Opening a reader reads every header and loads no tensor. A disagreement (a truncated file, a missing
shard, a tensor that only the index or only the shard has) is an error that names the file and the
tensor, before any weight is copied.

Files are written under temporary names; `finish` renames them, the index last. The index of a model
that is being replaced is removed first, so an interruption leaves a directory that the reader
refuses, never a mixture of two models.

    with ShardedWriter(directory) as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
    reader = ShardedReader(directory)
    for name, tensor in reader.tensors():
        parameters[name].copy_(tensor)
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron3.checkpoint.files import (
    DTYPES,
    full_disk_named,
    require_space,
    sync_directory,
    tensor_file,
    write_file,
)
from nemotron3.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor's entry in a header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def num_bytes(self) -> int:
        """Size of the data on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardedReader:
    """The tensors of a model directory; names, shapes and dtypes are known before any is loaded.

    Raises CheckpointError if files are missing, damaged or inconsistent.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._infos: dict[str, TensorInfo] = {}
        index = self._read_index()
        for file in dict.fromkeys(index.values()) if index else [SINGLE_FILE]:
            self._read_header(self.directory / file, index)
        for name, file in index.items():
            if name not in self._infos:
                raise CheckpointError(
                    f"{self.directory / file} lacks tensor {name!r}, which {INDEX_FILE} places "
                    "there; the download or copy is incomplete, fetch this shard again"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, shard by shard."""
        return tuple(self._infos)

    @property
    def total_bytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(info.num_bytes for info in self._infos.values())

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and file of one tensor, without loading it."""
        if name not in self._infos:
            raise CheckpointError(
                f"{self.directory} holds no tensor {name!r}; it has {len(self._infos)} others"
            )
        return self._infos[name]

    def load(self, name: str) -> Tensor:
        """One tensor, on the CPU; the caller owns the memory."""
        with _open(self.info(name).file) as shard:
            return _get(shard, name, self._infos[name].file)

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, or those of `names`, shard by shard; one shard is open at a time."""
        by_file: dict[Path, list[str]] = {}
        for name, info in self._infos.items():
            if names is None or name in names:
                by_file.setdefault(info.file, []).append(name)
        for file, held in by_file.items():
            with _open(file) as shard:
                for name in held:
                    yield name, _get(shard, name, file)

    def _read_index(self) -> dict[str, str]:
        """The weight map; empty if the model is a single file."""
        path = self.directory / INDEX_FILE
        if not path.exists():
            if not (self.directory / SINGLE_FILE).exists():
                raise CheckpointError(
                    f"{self.directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; name a model "
                    "directory, and if shards lie there without an index, save or fetch it again"
                )
            return {}
        try:
            index: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
            weight_map = index["weight_map"]
            files_are_plain = all(Path(file).name == file for file in weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not an index of shards ({error})") from error
        if not weight_map or not files_are_plain:
            raise CheckpointError(f"{path} must map tensors to files of its own directory")
        return weight_map

    def _read_header(self, file: Path, index: dict[str, str]) -> None:
        """Read the header of one file, and compare it with the index."""
        with _open(file) as shard:
            for name in shard.keys():  # noqa: SIM118 - a handle of the library, not a dict
                if index and index.get(name) != file.name:
                    place = index.get(name)
                    raise CheckpointError(
                        f"{file} holds tensor {name!r}, "
                        + (f"which {INDEX_FILE} places in {place}" if place else "")
                        + ("" if place else f"which {INDEX_FILE} does not name")
                        + "; it is there twice or by mistake, fetch the directory again"
                    )
                view = shard.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} is {view.get_dtype()}, which PyTorch cannot hold"
                    )
                shape = tuple(view.get_shape())
                self._infos[name] = TensorInfo(shape=shape, dtype=dtype, file=file)


class ShardedWriter:
    """Writes a model directory tensor by tensor; `finish` gives the files their final names.

    A tensor must not change after `add` until its shard is written: the writer makes no copy.
    A `with` block calls `finish` at its end, and removes the files after an error.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        max_shard_bytes: int = 5_000_000_000,
        total_bytes: int | None = None,
    ) -> None:
        """With `total_bytes`, raises StorageError at once if the disk is too small."""
        self.directory = Path(directory)
        self.max_shard_bytes = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._total_bytes = 0
        self._expected_bytes = total_bytes or 0
        with full_disk_named(self.directory, self._expected_bytes):
            self.directory.mkdir(parents=True, exist_ok=True)
        if total_bytes is not None:
            require_space(self.directory, total_bytes + _HEADER_BYTES)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add the next tensor; the order of calls decides which tensors share a shard."""
        self._check_new(name)
        if self._pending and self._pending_bytes + tensor.nbytes > self.max_shard_bytes:
            self._write_shard()
        self._names.add(name)
        self._pending[name] = tensor.detach()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write the last shard and give all files their final names."""
        if self._pending or not self._shards:
            self._write_shard()
        with full_disk_named(self.directory, self._needed_bytes):
            files = self._final_names()
            if len(files) > 1:
                self._write_index(files)
            stale = [p for p in self.directory.iterdir() if _is_weights(p) and p.name not in files]
            # From here to the last rename the directory has no index, so readers refuse it.
            (self.directory / INDEX_FILE).unlink(missing_ok=True)
            for path in stale:
                path.unlink(missing_ok=True)
            for number, file in enumerate(files):
                os.replace(self._temporary(number), self.directory / file)
            if len(files) > 1:
                os.replace(self._temporary_index, self.directory / INDEX_FILE)
            sync_directory(self.directory)
        self._shards = []

    def discard(self) -> None:
        """Remove the temporary files; files under final names are unchanged."""
        for number in range(len(self._shards) + 1):
            self._temporary(number).unlink(missing_ok=True)
        self._temporary_index.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return the writer; the end of the `with` block finishes the save."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish, or clean up after an error."""
        try:
            if kind is None:
                self.finish()
        finally:
            self.discard()

    def _check_new(self, name: str) -> None:
        if name in self._names:
            raise CheckpointError(f"tensor {name!r} was added twice to {self.directory}")

    @property
    def _needed_bytes(self) -> int:
        return max(self._expected_bytes, self._total_bytes) + _HEADER_BYTES

    @property
    def _temporary_index(self) -> Path:
        return self.directory / f".{INDEX_FILE}.tmp-{os.getpid()}"

    def _temporary(self, number: int) -> Path:
        return self.directory / f".model-{number + 1:05d}.tmp-{os.getpid()}"

    def _final_names(self) -> list[str]:
        count = len(self._shards)
        if count == 1:
            return [SINGLE_FILE]
        return [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]

    def _write_shard(self) -> None:
        try:
            with full_disk_named(self.directory, self._needed_bytes):
                write_file(self._temporary(len(self._shards)), tensor_file(self._pending))
        except BaseException:
            self.discard()
            raise
        self._shards.append(list(self._pending))
        self._pending = {}
        self._pending_bytes = 0

    def _write_index(self, files: list[str]) -> None:
        pairs = zip(files, self._shards, strict=True)
        weight_map = {name: file for file, names in pairs for name in names}
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        write_file(self._temporary_index, [json.dumps(index, indent=2).encode() + b"\n"])


def _open(file: Path) -> Any:
    """Open a shard with the library, and convert its errors to CheckpointError."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file} is missing; the download or copy is incomplete, fetch this file"
        ) from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}); it is truncated or damaged, "
            "fetch or save it again"
        ) from error


def _get(shard: Any, name: str, file: Path) -> Tensor:
    try:
        return shard.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: tensor {name!r} cannot be read ({error})") from error


def _is_weights(path: Path) -> bool:
    return path.name == SINGLE_FILE or _SHARD.fullmatch(path.name) is not None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises for a repeated key, of which `json` would silently keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice")
    return found
