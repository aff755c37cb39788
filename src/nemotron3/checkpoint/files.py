"""Files that are complete or absent, whatever happens while they are written.

`write_file` writes all bytes of a checkpoint. It hashes them while it writes, so that the digest is
that of the intended bytes, not of those that the disk returns, and it syncs before it returns.
This module writes the safetensors format itself, because the library gives access to the file only
when it is complete: hashing would need a second read, and a full disk would raise the library's own
error type. The format is 8 bytes of header length, a JSON header, and the tensors' little-endian
bytes (https://huggingface.co/docs/safetensors). The library reads the files, and so checks each one
that is written here.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemotron3.errors import CheckpointError, StorageError

assert sys.byteorder == "little", "safetensors files are little-endian, and so must the machine be"

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """The size of a file and the SHA-256 of its bytes."""

    num_bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileDigest:
    """Write, hash and sync one file. Raises `OSError`, which `full_disk_named` translates."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def digest_file(path: Path) -> FileDigest:
    """Size and hash of a file on the disk."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; otherwise a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_file(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time.

    Tensors may have any layout, be on any device, and share storage: each is written completely.
    """
    header, places = tensor_header(tensors)
    yield header
    for name in places:
        yield tensor_bytes(tensors[name])


def tensor_header(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and where in the file each tensor begins, in that order.

    Of the tensors only shapes and dtypes matter, so they may be on the meta device.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    # Wide types first, so that every tensor starts on a multiple of its item size.
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        end = offset + tensor.nbytes
        places[name] = offset
        dtype = _DTYPE_NAMES.get(tensor.dtype)
        if dtype is None:
            raise CheckpointError(
                f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold; "
                f"convert it to one of {', '.join(sorted(DTYPES))}"
            )
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8 bytes
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: start + at for n, at in places.items()}


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor, as they are written."""
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise StorageError before a save that does not fit on the disk."""
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise _no_space(directory, num_bytes, free)


@contextmanager
def full_disk_named(directory: Path, num_bytes: int) -> Iterator[None]:
    """Turn `OSError`s of writing into errors that name the needed and the free space."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(path for path in (directory, *directory.parents) if path.exists())
            free = shutil.disk_usage(existing).free
            raise _no_space(directory, num_bytes, free) from error
        raise StorageError(
            f"{directory} could not be written ({error.strerror}: {error.filename}); "
            "choose a directory that is writable"
        ) from error


def _no_space(directory: Path, needed: int, free: int) -> StorageError:
    return StorageError(
        f"{directory} has {free / 1e6:,.1f} MB free and this save needs {needed / 1e6:,.1f} MB; "
        "free some space, keep fewer checkpoints, or choose another directory"
    )
