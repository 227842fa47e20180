"""An ablation shared by several workers: the bytes of one, nothing done twice, nobody waited for in vain."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from test_ablate import projectors, rows, write

from fedcmp.ablation import processes
from fedcmp.ablation.processes import crew, gpus, machine, share
from fedcmp.cli import main
from fedcmp.extract.workers import Worker

pytestmark = pytest.mark.filterwarnings("default")
BROKEN = 'broken = { name = "fedavg", server_learning_rate = 1e38 }'


def start(path: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """In a folder of its own, where logs go."""
    command = [sys.executable, "-m", "fedcmp", "ablate", str(path), *words]
    return subprocess.Popen(
        command,
        cwd=path.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def plain(path: Path) -> str:
    out = path.parent / "report.md"
    result = CliRunner().invoke(main, ["ablate", str(path), "--jobs", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out.read_text()


def trained(folder: Path) -> list[str]:
    """Every run whose training any worker ended, as often as one did."""
    logs = "".join(file.read_text() for file in folder.rglob("build/ablations/*.log"))
    return sorted(re.findall(r"runs/study/(\S+)$", logs.replace("\n/", "/"), re.MULTILINE))


@pytest.fixture(scope="module")
def alone(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    plain(write(folder, extracted, BROKEN))
    return folder


def without_seconds(report: str) -> str:
    return re.sub(r"[0-9.,]+ (CPU )?s\b.*", "", report)


def test_two_workers_make_the_bytes_of_one(alone: Path, extracted: Path, tmp_path: Path) -> None:
    """Tuning waits for the scores of both, and what diverges holds nobody up."""
    path = write(tmp_path, extracted, BROKEN)
    both = [start(path, "--worker", "auto", "--jobs", "1", RANK=f"{n}", WORLD_SIZE="2") for n in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("writes the tables" in each for each in said)
    assert not (tmp_path / "report.md").exists()
    ours, theirs = projectors(tmp_path), projectors(alone)
    assert ours == theirs
    assert len(ours) == 6
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("runs/**/projector.safetensors")}
    report = plain(path)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert rows(tmp_path) == rows(alone)
    assert without_seconds(report) == without_seconds((alone / "report.md").read_text())
    logs = [file.read_text() for file in sorted(tmp_path.glob("build/ablations/study-*-of-2.log"))]
    done = [set(re.findall(r"^Run (\S+): ", log, re.MULTILINE)) for log in logs]
    assert len(done) == 2
    assert not done[0] & done[1]
    assert len(done[0] | done[1]) == 6


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_stopped_worker_leaves_is_done_by_the_other(
    alone: Path, extracted: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    path = write(tmp_path, extracted, BROKEN)
    one = start(path, "--worker", "0/2", "--jobs", "1")
    while one.poll() is None and not list(tmp_path.rglob("runs/**/.ablate.lock")):
        time.sleep(0.02)
    one.send_signal(sent)
    one.wait()
    other = start(path, "--worker", "1/2", "--jobs", "1")
    said, _ = other.communicate(timeout=300)
    assert other.returncode == 0, said
    assert projectors(tmp_path) == projectors(alone)


def test_a_run_that_is_held_is_waited_for(alone: Path, extracted: Path, tmp_path: Path) -> None:
    """Also by the command that writes the tables."""
    from fedcmp.pipeline.files import locked

    path = write(tmp_path, extracted)
    held = tmp_path / "build/runs/study/fedcmp-seed0/.ablate.lock"
    # Paths end alike whatever options are in their names.
    held.parent.mkdir(parents=True)
    names = {Path(name).parent.name for name in projectors(alone)}
    lock = next(held.parent.parent / name / held.name for name in names if re.match(r"fedcmp.*seed0$", name))
    with locked(lock, "held"):
        process = start(path, "--jobs", "2", "--out", str(tmp_path / "report.md"))
        while process.poll() is None and len(projectors(tmp_path)) < 5:
            time.sleep(0.1)
        time.sleep(2)
        assert process.poll() is None
        assert len(projectors(tmp_path)) == 5
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert len(projectors(tmp_path)) == 6


@pytest.mark.parametrize(
    ("worker", "auto", "environment", "here"),
    [
        (Worker(1, 4), False, {}, Worker(1, 4)),
        (Worker(5, 8), True, {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, Worker(1, 4)),
        (Worker(5, 8), True, {"SLURM_PROCID": "5", "SLURM_NTASKS": "8"}, Worker(0, 1)),
        (Worker(0, 2), True, {"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "2"}, Worker(0, 1)),
    ],
)
def test_who_shares_a_machine(worker: Worker, auto: bool, environment: dict[str, str], here: Worker) -> None:
    assert machine(worker, auto, environment) == here


def test_gpus_are_shared() -> None:
    seen = ["0", "GPU-b", "2", "3", "4"]
    shares = [share(seen, Worker(number, 2)) for number in range(2)]
    assert shares == [["0", "2", "4"], ["GPU-b", "3"]]
    assert [share(["6", "7"], Worker(number, 3)) for number in range(3)] == [["6"], ["7"], ["6"]]
    assert share([], Worker(1, 3)) == []


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcmp.pipeline.models.device.pick_device", lambda name: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert gpus({"CUDA_VISIBLE_DEVICES": "4,GPU-7"}) == ["4", "GPU-7"]
    assert gpus({}) == ["0", "1", "2"]
    monkeypatch.setattr("fedcmp.pipeline.models.device.pick_device", lambda name: "cpu")
    assert gpus({"CUDA_VISIBLE_DEVICES": "4"}) == []


def environment_of(seconds: float) -> tuple[str | None, ...]:
    """In a process of the pool; torch has been imported there after its device was set."""
    time.sleep(seconds)
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    return (*(os.environ.get(name) for name in names), str(torch.get_num_threads()))


def test_every_process_has_a_gpu_and_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many processes as this worker has GPUs; none of them takes part in a launcher's group."""
    monkeypatch.setattr(processes, "gpus", lambda environment: ["0", "1", "2", "3"])
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    here = machine(Worker(1, 2), True, os.environ)
    with crew(None, Worker(1, 2), here) as pool:
        futures = [pool.submit(environment_of, 3.0) for _ in range(2)]
        found = sorted(str(future.result()[0]) for future in futures)
        rest = {future.result()[1:] for future in futures}
    assert found == ["1", "3"]
    assert rest == {("1", None, None, None, "1")}


def test_without_gpus_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 6)
    monkeypatch.setattr(processes, "gpus", lambda environment: [])
    for count, size in ((1, 6), (2, 3), (4, 1), (9, 1)):
        with crew(None, Worker(0, count), Worker(0, count)) as pool:
            assert pool.pool._max_workers == size


def test_a_wrong_worker_is_one_line(extracted: Path, tmp_path: Path) -> None:
    path = write(tmp_path, extracted)
    result = CliRunner().invoke(main, ["ablate", str(path), "--worker", "2/2"])
    assert (result.exit_code, "numbered from 0 to 1" in result.output) == (2, True)
