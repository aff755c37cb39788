"""Token files: a corpus on disk, in Megatron's .bin / .idx format.

`NAME.bin` contains only the concatenated tokens of all documents, so it can be mapped into memory
and sliced; `NAME.idx` contains the document boundaries. The format is Megatron-LM's IndexedDataset,
so each can read the other's files. Little-endian:

    9 bytes    "MMIDIDX" and two zero bytes
    uint64     version, 1
    uint8      type of a token: 8 is uint16, 4 is int32 (others are read, these are written)
    uint64     number of sequences, n
    uint64     number of document bounds, d + 1
    int32 [n]      tokens in each sequence
    int64 [n]      byte offset of each sequence in the .bin
    int64 [d + 1]  first sequence of each document, and n at the end

A document is written as one sequence; files with several sequences per document can be read, and
the sequences of a document are joined. A file is complete or absent: both parts are written under
temporary names, and the .idx is renamed last.
"""

import os
import struct
import uuid
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nemotron3.errors import DataError, StorageError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CODES = {np.dtype(name): code for code, name in _DTYPES.items()}
_UINT16_VOCAB = 65_536


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which a vocabulary's ids are stored: two bytes if they fit."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCAB else "<i4")


class TokenFileWriter:
    """Writes documents one after another; the file appears when the `with` block ends normally.

        with TokenFileWriter("corpus/train", vocab_size=4096) as writer:
            writer.add(tokens)

    `prefix` is the path without suffix. After an exception no file remains.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self._prefix = Path(prefix)
        self._dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._lengths: list[int] = []
        mark = f".{uuid.uuid4().hex[:8]}.tmp"
        self._temporary = {
            suffix: self._prefix.with_name(self._prefix.name + suffix + mark)
            for suffix in (".bin", ".idx")
        }
        try:
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._temporary[".bin"].open("wb")
        except OSError as error:
            raise _storage_error(self._prefix, error) from error

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            self._finish()
        except OSError as failure:
            self._discard()
            raise _storage_error(self._prefix, failure) from failure

    def add(self, tokens: ArrayLike) -> None:
        """Append a document."""
        document = np.asarray(tokens)
        if document.ndim != 1 or len(document) == 0:
            raise DataError(f"a document is a row of one or more ids, got shape {document.shape}")
        if document.min() < 0 or document.max() >= self._vocab_size:
            raise DataError(
                f"document {len(self._lengths)} has ids {document.min()} to {document.max()}, "
                f"outside the vocabulary of {self._vocab_size}; it was made with another tokenizer"
            )
        try:
            self._stream.write(document.astype(self._dtype).tobytes())
        except OSError as error:
            raise _storage_error(self._prefix, error) from error
        self._lengths.append(len(document))

    def _finish(self) -> None:
        _sync_and_close(self._stream)
        lengths = np.array(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype="<i8") * self._dtype.itemsize
        pointers = np.concatenate([np.zeros(1, "<i8"), ends])[:-1] if len(lengths) else ends
        with self._temporary[".idx"].open("wb") as index:
            count = len(lengths)
            index.write(
                _HEADER.pack(_MAGIC, _VERSION, _CODES[self._dtype], count, count + 1)
                + lengths.tobytes()
                + pointers.tobytes()
                + np.arange(count + 1, dtype="<i8").tobytes()
            )
            _sync_and_close(index)
        for suffix in (".bin", ".idx"):
            final = self._prefix.with_name(self._prefix.name + suffix)
            self._temporary[suffix].replace(final)

    def _discard(self) -> None:
        # On a full disk the flush may fail; the file is discarded anyway.
        try:
            self._stream.close()
        except OSError:
            pass
        finally:
            for file in self._temporary.values():
                file.unlink(missing_ok=True)


class TokenFile:
    """Read access to a token file, which is memory-mapped.

    `prefix` is the path without suffix. Opening checks that header, sizes and offsets agree, and
    raises DataError if not.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path = self.prefix.with_name(self.prefix.name + ".bin")
        self.idx_path = self.prefix.with_name(self.prefix.name + ".idx")
        for file in (self.idx_path, self.bin_path):
            if not file.is_file():
                raise DataError(f"{file} is missing; a token file is a pair of .bin and .idx")
        self.dtype, lengths, documents = _read_index(self.idx_path)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self.document_bounds: NDArray[np.int64] = bounds[documents]
        """First token of each document, and the end of the last."""
        expected = int(bounds[-1]) * self.dtype.itemsize
        found = self.bin_path.stat().st_size
        if found != expected:
            raise DataError(
                f"{self.bin_path} has {found} bytes, its index tells of {expected}: "
                f"truncated or of another index; prepare the corpus again"
            )
        # A file without tokens cannot be mapped.
        self.tokens: NDArray[np.integer] = (
            np.memmap(self.bin_path, dtype=self.dtype, mode="r")
            if expected
            else np.zeros(0, self.dtype)
        )
        """All tokens, mapped read-only."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_bounds) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens over all documents."""
        return len(self.tokens)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each document."""
        return np.diff(self.document_bounds)

    def document(self, index: int) -> NDArray[np.integer]:
        """The tokens of one document, a view of the mapped file."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents} in {self.prefix}")
        start, end = self.document_bounds[index : index + 2]
        return self.tokens[start:end]

    def __len__(self) -> int:
        return self.num_documents


def _read_index(file: Path) -> tuple[np.dtype, NDArray[np.int32], NDArray[np.int64]]:
    """The checked dtype, sequence lengths and document indices of an .idx file."""
    raw = file.read_bytes()
    if len(raw) < _HEADER.size:
        raise DataError(f"{file} has {len(raw)} bytes, less than a header; prepare it again")
    magic, version, code, num_sequences, num_bounds = _HEADER.unpack_from(raw)
    if magic != _MAGIC:
        raise DataError(f"{file} is no token index (it starts with {magic!r}); check the path")
    if version != _VERSION:
        raise DataError(f"{file} is of version {version}, version {_VERSION} is read")
    if code not in _DTYPES:
        raise DataError(f"{file}: token type {code} is none of {sorted(_DTYPES)}; not integers?")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds
    if len(raw) != expected:
        raise DataError(
            f"{file} has {len(raw)} bytes, {num_sequences} sequences and {num_bounds} bounds need "
            f"{expected}: truncated or damaged; prepare the corpus again"
        )
    dtype = np.dtype(_DTYPES[code])
    lengths, rest = _take(raw, _HEADER.size, "<i4", num_sequences)
    pointers, rest = _take(raw, rest, "<i8", num_sequences)
    documents, _ = _take(raw, rest, "<i8", num_bounds)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if np.any(lengths < 0) or not np.array_equal(pointers[1:], ends[:-1]) or pointers[:1].any():
        raise DataError(f"{file}: offsets and lengths disagree: damaged; prepare the corpus again")
    is_ordered = num_bounds > 0 and documents[0] == 0 and documents[-1] == num_sequences
    if not is_ordered or np.any(np.diff(documents) < 0):
        raise DataError(f"{file}: document bounds are not in order; prepare the corpus again")
    return dtype, lengths, documents


def _take(raw: bytes, offset: int, dtype: str, count: int) -> tuple[NDArray, int]:
    array = np.frombuffer(raw, dtype=dtype, count=count, offset=offset)
    return array, offset + array.nbytes


def _sync_and_close(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _storage_error(prefix: Path, error: OSError) -> StorageError:
    return StorageError(f"{prefix} could not be written ({error.strerror}); free space or move it")
