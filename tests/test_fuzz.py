"""Hundreds of damaged and forged files: each works or is refused in one line, in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

MEMORY = 96 << 20


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("zip", 300),
        ("folder", 200),
        ("hdf5", 12),
        ("hdf5 source", 8),
        ("hdf5 heap", 6),
        ("parquet", 6),
        ("arrow", 6),
        ("tar", 100),
    ],
)
def test_never_a_traceback(kind: str, number: int) -> None:
    """A process of its own, whose memory is measured; what is undamaged must not be all that was tried."""
    result = subprocess.run(
        [sys.executable, ROOT / "tests/fuzz.py", kind, str(number), "0"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=500,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert found["tried"] == number
    # Of a damaged tar, heap or table less is read, and nothing is refused.
    assert kind in ("tar", "hdf5 heap", "parquet", "arrow") or found["refused"] > number / 5
    assert found["grown"] < MEMORY
