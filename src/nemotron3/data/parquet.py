"""Rows of one text column of a Parquet file: the only module that imports pyarrow.

Values are bytes, which the caller decodes, because a string column may contain bytes that are not
UTF-8; such a row must count as a bad row and not end the reading of the file.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from nemotron3.errors import DataError, DependencyMissingError

_BATCH_ROWS = 1024


def parquet_rows(file: Path, column: str) -> Iterator[bytes | None]:
    """Yield the column's values in order; None where a row has no value."""
    arrow, parquet = _pyarrow()
    try:
        table = parquet.ParquetFile(file)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no readable Parquet file ({error}); fetch it again") from error
    with table:
        schema = table.schema_arrow
        if column not in schema.names:
            raise DataError(
                f"{file} has no column {column!r}; it has {', '.join(schema.names)}: "
                f"set the column to one of them"
            )
        kind = schema.field(column).type
        if arrow.types.is_dictionary(kind):
            kind = kind.value_type
        if not _is_textual(arrow, kind):
            raise DataError(f"{file}: column {column!r} holds {kind}, text was expected")
        try:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
                yield from batch.column(0).cast(arrow.large_binary()).to_pylist()
        except (arrow.ArrowException, OSError) as error:
            raise DataError(f"{file} is damaged ({error}); fetch it again") from error


def _is_textual(arrow: Any, kind: Any) -> bool:
    types = arrow.types
    return any(
        test(kind)
        for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )


def _pyarrow() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise DependencyMissingError(
            "Parquet files need pyarrow: pip install 'nemotron3[parquet]'"
        ) from error
