"""A GGUF file, written tensor by tensor: nothing of it but the current tensor is in memory.

The package `gguf` writes the header; names of types are its own in small letters, such as `q8_0`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from nemotron3.checkpoint.files import full_disk_named, require_space
from nemotron3.errors import DependencyMissingError

Layout = Mapping[str, tuple[tuple[int, ...], str]]
"""Shape, in PyTorch's order, and type of each tensor by its name."""


def gguf_library() -> Any:
    """The package `gguf`; DependencyMissingError if it is not installed."""
    try:
        import gguf  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise DependencyMissingError(
            "writing GGUF needs the package gguf: pip install 'nemotron3[gguf]'"
        ) from error
    return gguf


def num_tensor_bytes(shape: tuple[int, ...], type_: str) -> int:
    """Bytes of a tensor; its rows must be whole blocks of the type."""
    gguf = gguf_library()
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_.upper()]]
    assert shape[-1] % block == 0, f"rows of {shape[-1]} are no whole blocks of {type_}"
    elements = 1
    for length in shape:
        elements *= length
    return elements // block * size


def write_gguf(
    out: Path,
    fields: Mapping[str, Any],
    layout: Layout,
    values: Iterable[np.ndarray[Any, Any]],
    *,
    architecture: str,
    file_type: str,
) -> None:
    """Write the file beside `out` and put it in its place.

    `values` are the stored bytes of the tensors in the order of `layout`, each asked for when the
    one before is written. StorageError, before the first, if the disk is too small.
    """
    gguf = gguf_library()
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    _add_fields(writer, fields)
    sizes = [num_tensor_bytes(shape, type_) for shape, type_ in layout.values()]
    for (name, (shape, type_)), size in zip(layout.items(), sizes, strict=True):
        kind = gguf.GGMLQuantizationType[type_.upper()]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    require_space(out.parent, sum(sizes))
    with full_disk_named(out.parent, sum(sizes)):
        # Not a file of `tempfile`, which no other user may read.
        temporary = out.with_name(f".{out.name}.{uuid4().hex}")
        try:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for value, size in zip(values, sizes, strict=True):
                assert value.nbytes == size, f"{value.nbytes} bytes of a tensor of {size}"
                writer.write_tensor_data(value)
            writer.close()
            os.replace(temporary, out)
        finally:
            writer.close()
            temporary.unlink(missing_ok=True)


def _add_fields(writer: Any, fields: Mapping[str, Any]) -> None:
    """Add metadata with the types that llama.cpp reads: unsigned numbers, floats, texts, lists."""
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
