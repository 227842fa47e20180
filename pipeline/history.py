"""What happened in every round, as JSON lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fedcmp.pipeline.files import write_atomic

HISTORY = "history.jsonl"


# What strategies' own figures may not be called.
_OF_CLIENTS = {"round", "client", "loss", "samples", "tokens", "flops", "seconds", "recalled", "update_norm"}
OF_EVERY_ROW = _OF_CLIENTS | {"epsilon", "missing", "bytes", "bytes_received"}


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows and flush them to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def truncate(path: Path, rounds: int) -> None:
    """Keep the rows of the first `rounds` rounds; a half-written last line is dropped."""
    kept = [row for row in read(path) if row["round"] < rounds]
    write_atomic(path, _lines(kept).encode())


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows; none where there is no file."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
