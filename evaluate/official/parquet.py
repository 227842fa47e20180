"""Rows of parquet files, read in a process of its own, as damage can abort Arrow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedcmp.pipeline.apart import apart
from fedcmp.pipeline.errors import UserError, one_line

_ROWS = 16  # of pictures, most of them
_BUFFER = 1 << 20


def parquet_rows(path: Path, what: str, columns: Collection[str] | None) -> Iterator[dict[str, Any]]:
    """Every row; a few are in memory at a time.

    Args:
        path: The file.
        what: What the rows are, for error messages.
        columns: Those to read, as far as they are there; all by default.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    if find_spec("pyarrow") is None:
        raise UserError(f"{path}: parquet needs pyarrow; run: pip install 'fedcmp[parquet]'")
    for rows in apart(path, batches_here, path, what, columns):
        yield from rows


def batches_here(path: Path, what: str, columns: Collection[str] | None) -> Iterator[list[dict[str, Any]]]:
    """`parquet_rows` within this process, some rows at a time."""
    from pyarrow.parquet import ParquetFile

    try:
        # Unbuffered, whole groups of rows would be in memory.
        with ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            there = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS, [group], there, use_threads=False):
                    yield batch.to_pylist()
    except OSError as error:
        if error.strerror:
            raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from None
        raise UserError(f"{path}: {what} is not valid parquet: {one_line(error)}") from None
    except Exception as error:  # pyarrow raises nearly anything on damaged files
        raise UserError(f"{path}: {what} is not valid parquet: {one_line(error)}") from None
