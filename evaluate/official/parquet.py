"""Rows of parquet files."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedcmp.pipeline.errors import UserError, one_line

_ROWS = 16  # of pictures, most of them


def parquet_rows(path: Path, what: str, columns: Collection[str] | None) -> Iterator[dict[str, Any]]:
    """Every row; a few are in memory at a time.

    Args:
        path: The file.
        what: What the rows are, for error messages.
        columns: Those to read, as far as they are there; all by default.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: parquet needs pyarrow; run: pip install 'fedcmp[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            there = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(_ROWS, columns=there):
                yield from batch.to_pylist()
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(f"{path}: {what} cannot be read ({reason})") from None
    except ArrowException as error:
        raise UserError(f"{path}: {what} is not valid parquet: {one_line(error)}") from None
