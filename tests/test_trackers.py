"""Trackers get every round once, also where a run was interrupted; those that are installed, for real."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT

from fedcmp.cli import main
from fedcmp.federate.server.tracker import TRACKERS, Tracked, figures, tracked

ROWS: list[dict[str, Any]] = [
    {
        "round": round_,
        "client": client,
        "loss": 2.0 - round_ / 4,
        "samples": 8,
        "epsilon": None,
        "missing": [],
    }
    for round_ in range(4)
    for client in ("berlin", "lyon", None)
]


def send(name: str, out: Path, rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> None:
    run = Tracked("clinics", "fedcmp", "f" * 64, {"seed": 3, "federate": {"rounds": 4}}, out)
    with tracked(name, run, before) as track:
        for start in range(0, len(rows), 3):
            track(rows[start : start + 3])


def interrupted(name: str, out: Path) -> None:
    """Two rounds are sent, of which the second has to be done again; then the rest."""
    out.mkdir(parents=True, exist_ok=True)
    send(name, out, ROWS[:6], [])
    send(name, out, ROWS[3:], ROWS[:3])


def test_figures_are_the_numbers_of_a_round() -> None:
    assert figures(ROWS[:3]) == {
        "berlin/loss": 2.0,
        "berlin/samples": 8.0,
        "lyon/loss": 2.0,
        "lyon/samples": 8.0,
        "loss": 2.0,
        "samples": 8.0,
    }


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupted("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lyon/loss"):
        assert [(each.step, each.value) for each in events.Scalars(name)] == [
            (0, 2.0),
            (1, 1.75),
            (2, 1.5),
            (3, 1.25),
        ]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/all.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    interrupted("mlflow", tmp_path)
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("clinics").experiment_id])
    history = client.get_metric_history(run.info.run_id, "lyon/loss")
    assert [(each.step, each.value) for each in history] == [(0, 2.0), (1, 1.75), (2, 1.5), (3, 1.25)]
    assert run.info.status == "FINISHED"


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    out.mkdir()
    send("wandb", out, ROWS, [])
    (file,) = out.glob("wandb/offline-run-*/run-*.wandb")
    assert b"lyon/loss" in file.read_bytes()


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    # Where it keeps its data is read when it is imported.
    code = "import sys; sys.path.insert(0, 'tests'); import test_trackers as t; from pathlib import Path; "
    code += f"t.send('trackio', Path({str(tmp_path)!r}), t.ROWS, [])"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    (file,) = (tmp_path / "trackio").glob("clinics*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)["lyon/loss"]) for step, metrics in rows] == [
        (0, 2.0),
        (1, 1.75),
        (2, 1.5),
        (3, 1.25),
    ]


def federate(config: Path, run: str, tracker: str | None) -> Result:
    more = ["--set", f"tracker={tracker}"] if tracker else []
    return CliRunner().invoke(main, ["federate", str(config), "--set", f"run={run}", *more])


def test_a_tracker_that_is_not_installed_is_named(extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = federate(extracted, "untracked", "wandb")
    assert result.exit_code == 2
    assert "pip install 'fedcmp[wandb]'" in result.output


def test_a_tracker_that_fails_ends_no_run(extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    @contextmanager
    def unreachable(run: Tracked) -> Iterator[Any]:
        def log(round_: int, figures: Any) -> None:
            sent.append(round_)
            raise ConnectionError("no route to host")

        yield log

    monkeypatch.setitem(TRACKERS, "mlflow", unreachable)
    result = federate(extracted, "unreachable", "mlflow")
    assert result.exit_code == 0
    assert result.output.count("no route to host; the run goes on without it") == 1
    assert sent == [0]


def test_a_run_is_the_same_with_a_tracker(extracted: Path) -> None:
    pytest.importorskip("tensorboard")
    runs = extracted.parent / "build/runs/study"
    assert federate(extracted, "plain", None).exit_code == 0
    assert "nothing to do" in federate(extracted, "plain", "tensorboard").output
    assert federate(extracted, "tracked", "tensorboard").exit_code == 0
    first, second = (json.loads((runs / name / "manifest.json").read_text()) for name in ("plain", "tracked"))
    assert first["projectors"] == second["projectors"]
    assert list(runs.glob("tracked/tensorboard/events.out.tfevents.*"))
