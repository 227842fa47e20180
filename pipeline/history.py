"""What happened in every round, as JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.pipeline.files import write_atomic

if TYPE_CHECKING:
    pass


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows and flush them to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def truncate(path: Path, rounds: int) -> None:
    """Keep the rows of the first `rounds` rounds; a half-written last line is dropped."""
    kept = [row for row in read(path) if row["round"] < rounds] if path.is_file() else []
    write_atomic(path, _lines(kept).encode())


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
