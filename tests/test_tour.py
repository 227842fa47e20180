"""The notebook runs from top to bottom, and shows what it shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOK = json.loads((ROOT / "docs/tour.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
CHECKS = """
assert {name: (cache.images, cache.patches, cache.d_vision) for name, cache in caches.items()} == SHAPES
assert set(runs) == set(scores) == {"fedavg", "fedcmp"}
for name in runs:
    rounds = [row for row in runs[name].history if row["client"] is None]
    assert len(rounds) == 6
    assert scores[name]["loss: loss"].value < 1.0
    assert scores[name]["pope: accuracy"].low > 0.5
assert [row.metric for row in rows] == ["loss: loss", "pope: f1", "pope: accuracy"]
assert rows[0].ours == scores["fedcmp"]["loss: loss"].value
assert len(axes.lines) == 2 and all(len(line.get_xdata()) == 6 for line in axes.lines)
"""


def test_the_tour_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shapes = next(
        "".join(output["data"]["text/plain"])
        for cell in CELLS
        for output in cell["outputs"]
        if output["output_type"] == "execute_result" and "'photo': (" in "".join(output["data"]["text/plain"])
    )
    source = "\n".join("".join(cell["source"]) for cell in CELLS)
    script = tmp_path / "tour.py"
    script.write_text(f"{source}\nSHAPES = {shapes}\n{CHECKS}")
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


def test_outputs_tell_nothing_of_the_machine_that_made_them() -> None:
    outputs = json.dumps([cell["outputs"] for cell in CELLS])
    assert "/tmp" not in outputs
    assert "Traceback" not in outputs
