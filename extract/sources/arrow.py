"""Files of tables, Parquet or the Arrow streams that `datasets` saves, a few rows in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedcmp.extract.shortage import shortage
from fedcmp.extract.sources import Skipped
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.remote import Remote

_AT_ONCE = 1 << 25
_MOST_ROWS = 1024
# Pictures shrink little; zeros shrink a thousandfold.
_GROWTH, _GROWTH_FROM = 200, 1 << 26
_BUFFER = 1 << 20
_ASKED = re.compile(r"of size (\d+) failed")


class Table(Protocol):
    """An open file; `schema` is a `pyarrow.Schema`."""

    schema: Any

    @property
    def rows(self) -> int | None:
        """Their number, None where only reading them all would tell."""

    def batches(self, columns: Sequence[str], names_of: str | None = None) -> Iterator[tuple[int, Any]]:
        """The number of each batch's first row, and a `pyarrow.RecordBatch`, or what is read in its place.

        Args:
            columns: Those that are read; nothing is without any.
            names_of: One of them of which only the `path` fields are wanted.

        Raises:
            Exception: Nearly anything, on damaged files.
        """


@contextmanager
def opened(shard: Path | Remote) -> Iterator[Table]:
    """Open a file: an Arrow stream where it ends on `.arrow`, else Parquet.

    Raises:
        UserError: pyarrow is missing, or the file cannot be read now.
        Exception: Nearly anything, on damaged files.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"{shard}: reading it needs pyarrow; pip install 'fedcmp[parquet]'") from None
    kind = _Stream if shard.suffix == ".arrow" else _Parquet
    if isinstance(shard, Remote):
        with shard.open(here_and_there=kind is _Parquet) as file:
            yield kind(shard, pa.PythonFile(file, mode="r"))
    else:
        # Mapped, a stream takes memory only for what is looked at.
        with pa.memory_map(str(shard)) if kind is _Stream else pa.OSFile(str(shard)) as file:
            yield kind(shard, file)


class _Parquet:
    def __init__(self, shard: Path | Remote, file: Any) -> None:
        import pyarrow.parquet as pq

        self._shard = shard
        # From afar whole row groups are fetched at once.
        far = isinstance(shard, Remote)
        self._file = pq.ParquetFile(file, buffer_size=0 if far else _BUFFER, pre_buffer=far)
        self.schema = self._file.schema_arrow

    @property
    def rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, columns: Sequence[str], names_of: str | None = None) -> Iterator[tuple[int, Any]]:
        first = 0
        if not columns:
            return
        wanted = [part for column in columns for part in self._parts(column, column == names_of)]
        for number in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(number)
            at, end = first, first + group.num_rows
            try:
                size = _checked_size(group)
                rows = min(max(_AT_ONCE * group.num_rows // max(size, 1), 1), _MOST_ROWS)
                for batch in self._file.iter_batches(rows, [number], wanted, use_threads=False):
                    yield at, batch
                    at += batch.num_rows
                if at != end:
                    raise ValueError(f"{at - first} rows where {group.num_rows} are declared")
            except Exception as error:  # pyarrow raises nearly anything on damaged files
                yield at, damaged(self._shard, f"[{at}-{end - 1}]", error)
            first = end

    def _parts(self, column: str, only_names: bool) -> list[str]:
        if not only_names:
            return [column]
        schema = self._file.schema
        leaves = [schema.column(place).path for place in range(len(schema))]
        return [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]


class _Stream:
    def __init__(self, shard: Path | Remote, file: Any) -> None:
        import pyarrow as pa

        self._shard, self._file = shard, file
        self.schema = pa.ipc.open_stream(file).schema

    @property
    def rows(self) -> int | None:
        if isinstance(self._shard, Remote):
            return None
        return sum(batch.num_rows for batch in self._read([]))

    def batches(self, columns: Sequence[str], names_of: str | None = None) -> Iterator[tuple[int, Any]]:
        at = 0
        if not columns:
            return
        try:
            for batch in self._read(columns):
                for number, part in self._usable(batch, at):
                    yield number, _only_names(part, names_of) if names_of else part
                at += batch.num_rows
        except Exception as error:  # pyarrow raises nearly anything on damaged files
            yield at, damaged(self._shard, f"[{at}-]", error)

    def _read(self, columns: Sequence[str]) -> Iterator[Any]:
        import pyarrow as pa

        fields = sorted(self.schema.get_field_index(column) for column in columns)
        self._file.seek(0)
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields or [0])
        yield from pa.ipc.open_stream(self._file, options=options)

    def _usable(self, batch: Any, first: int) -> Iterator[tuple[int, Any]]:
        """The batch, or its rows one by one where some lead out of it, which is noticed nowhere else."""
        import pyarrow as pa

        try:
            batch.validate(full=True)
            yield first, batch
        except pa.ArrowInvalid:
            for place in range(batch.num_rows):
                row = batch.slice(place, 1)
                try:
                    row.validate(full=True)
                    yield first + place, row
                except pa.ArrowInvalid as error:
                    yield first + place, damaged(self._shard, f"[{first + place}]", error)


def _only_names(batch: Any, column: str) -> Any:
    """A batch whose pictures are their `path` fields alone, so that no byte of them is read."""
    import pyarrow as pa

    def bare(array: Any) -> Any:
        if isinstance(array, pa.StructArray):
            return pa.StructArray.from_arrays([array.field("path")], ["path"])
        return type(array).from_arrays(array.offsets, bare(array.values))

    if isinstance(batch, Skipped):
        return batch
    names = bare(batch.column(column))
    return batch.set_column(batch.schema.get_field_index(column), column, names)


def _checked_size(group: Any) -> int:
    """Bytes of a row group.

    Raises:
        ValueError: It grows as nothing but an attack does.
    """
    stored = sum(group.column(place).total_compressed_size for place in range(group.num_columns))
    size = int(group.total_byte_size)
    if size > _most(stored):
        raise ValueError(f"{stored} bytes would become {size}; no pictures do that")
    return size


def _size(shard: Path | Remote) -> int:
    if isinstance(shard, Remote):
        return (shard.facts() or (0, ""))[0]
    return shard.stat().st_size


def _most(stored: int) -> int:
    """Bytes that as many stored ones may become."""
    return max(_GROWTH * stored, _GROWTH_FROM)


def damaged(shard: Path | Remote, rows: str, error: Exception) -> Skipped:
    """What is reported of damage, and of which rows it is.

    Raises:
        Exception: It may pass, and a hole in the cache would stay.
    """
    asked = _ASKED.search(str(error)) if isinstance(error, MemoryError) else None
    if asked is not None and int(asked[1]) > _most(_size(shard)):
        return Skipped(f"{shard}{rows}", f"damaged: it claims {asked[1]} bytes")
    if isinstance(error, UserError) or shortage(error):
        raise error
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"{shard}: cannot be read ({error}); fix that and rerun to go on") from None
    return Skipped(f"{shard}{rows}", f"damaged: {one_line(error)}")
