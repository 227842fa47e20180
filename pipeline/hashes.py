"""Hashes of values and files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces, so that equal values have equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def fingerprint_all(values: Iterable[Any]) -> str:
    """The `fingerprint` of a list of values, of which one is in memory at a time."""
    digest, before = hashlib.sha256(), b"["
    for value in values:
        digest.update(before + canonical(value))
        before = b","
    digest.update(b"[]" if before == b"[" else b"]")
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
