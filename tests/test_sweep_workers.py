"""An ablation shared by several workers: the bytes of one, nothing done twice, nobody waited for in vain."""

from __future__ import annotations

import os
import re
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
from fedcmp.pipeline.files import locked

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


@pytest.fixture(scope="module")
def alone(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    plain(write(folder, extracted, BROKEN))
    return folder


def comparable(folder: Path) -> str:
    """A report without seconds and places."""
    text = (folder / "report.md").read_text().replace(str(folder), "")
    return re.sub(r"[0-9.,]+ (CPU )?s\b.*", "", text)


@pytest.mark.skipif("not config.getoption('--slow')")
def test_two_workers_make_the_bytes_of_one(alone: Path, extracted: Path, tmp_path: Path) -> None:
    """After one was killed, and while another process holds a run, which both wait for.

    Tuning waits for the scores of both, what diverges holds nobody up, and no run is made twice.
    """
    path = write(tmp_path, extracted, BROKEN)
    killed = start(path, "--worker", "0/2", "--jobs", "1")
    while killed.poll() is None and not list(tmp_path.rglob("runs/**/.ablate.lock")):
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    for log in tmp_path.rglob("build/ablations/*.log"):
        log.unlink()
    names = {Path(name).parent.name for name in projectors(alone)}
    (last,) = (name for name in names if re.match(r"fedcmp.*seed0$", name))
    with locked(tmp_path / "build/runs/study" / last / ".ablate.lock", "held"):
        both = [start(path, "--worker", "auto", "--jobs", "1", RANK=f"{n}", WORLD_SIZE="2") for n in range(2)]
        while len(projectors(tmp_path)) < 5 and all(process.poll() is None for process in both):
            time.sleep(0.1)
        time.sleep(2)
        assert [process.poll() for process in both] == [None, None]
        assert len(projectors(tmp_path)) == 5
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("writes the tables" in each for each in said)
    assert not (tmp_path / "report.md").exists()
    ours = projectors(tmp_path)
    assert ours == projectors(alone)
    assert len(ours) == 6
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("runs/**/projector.safetensors")}
    plain(path)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert rows(tmp_path) == rows(alone)
    assert comparable(tmp_path) == comparable(alone)
    logs = [file.read_text() for file in sorted(tmp_path.glob("build/ablations/study-*-of-2.log"))]
    made = [re.findall(r"^ *Run (\S+): ", log, re.MULTILINE) for log in logs]
    assert len(made) == 2
    assert sorted(set(made[0] + made[1])) == sorted(made[0] + made[1])


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
