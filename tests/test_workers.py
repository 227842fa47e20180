from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, digest, picture, write_llava, write_shard

from fedcmp.cli import main
from fedcmp.extract.workers import Worker, parse
from fedcmp.pipeline.cache import CacheWriter, FeatureCache, Identity, Row, open_writer, partial_path, writing
from fedcmp.pipeline.errors import UserError

IDENTITY = Identity({"encoder": {"layer": -2}}, {"files": "abc"})
LAYOUT = {"patches": 2, "d_vision": 3, "dtype": "float32", "shard_images": 4}


def experiment(root: Path, clip_dir: Path, llama_dir: Path, data: Path) -> Path:
    root.mkdir(exist_ok=True)
    path = root / "two.toml"
    path.write_text(
        f'experiment = "two"\nfeatures = "{root}/features"\nbuild = "{root}/build"\n'
        f'[extract]\nshard_images = 4\nbatch_size = 3\n[extract.encoder]\nname = "transformers"\n'
        f'path = "{clip_dir}"\n[extract.silos]\n'
        f'one = {{ name = "llava_json", path = "{data}/pairs.json", images = "{data}" }}\n'
        f'lab = {{ name = "webdataset", path = "{data}/*.tar" }}\n'
        f'[language]\npath = "{llama_dir}"\n[federate]\nsilos = ["one"]\n'
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two silos with an unreadable image and a bad sample among them."""
    root = tmp_path_factory.mktemp("data")
    write_llava(root, 90)
    (root / "scans/017.png").write_bytes(b"no picture")
    samples = [{"__key__": f"{n}", "png": picture(n), "txt": b"words"} for n in range(30)]
    write_shard(root / "0.tar", [*samples, {"__key__": "bare", "txt": b"words"}])
    return root


def run(path: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["extract", str(path), *words])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clip_dir: Path, llama_dir: Path, data: Path) -> str:
    """Digest of what a lone process makes."""
    path = experiment(tmp_path_factory.mktemp("whole"), clip_dir, llama_dir, data)
    assert run(path).exit_code == 0
    return digest(path.parent / "features")


def start(path: Path, worker: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fedcmp", "extract", str(path), "--worker", worker],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.skipif("not config.getoption('--slow')")
def test_three_at_once_make_the_very_bytes(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, data: Path, whole: str
) -> None:
    path = experiment(tmp_path, clip_dir, llama_dir, data)
    tasks = [start(path, "auto", SLURM_ARRAY_TASK_ID=f"{n}", SLURM_ARRAY_TASK_COUNT="3") for n in range(3)]
    for task in tasks:
        output, _ = task.communicate(timeout=300)
        assert task.returncode == 0, output
    assert digest(tmp_path / "features") == whole
    assert "Nothing to do" in run(path).output


def test_one_killed_and_started_again(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, data: Path, whole: str
) -> None:
    path = experiment(tmp_path, clip_dir, llama_dir, data)
    tasks = [start(path, f"{n}/3") for n in range(3)]
    done = partial_path(tmp_path / "features/one.zarr") / "_done"
    deadline = time.monotonic() + 120
    while not (done / "00001.json").exists() and time.monotonic() < deadline:
        assert tasks[1].poll() is None
        time.sleep(0.002)
    os.kill(tasks[1].pid, signal.SIGKILL)
    for task in tasks:
        task.communicate(timeout=300)
    assert [task.returncode for task in tasks] == [0, -signal.SIGKILL, 0]
    assert not (tmp_path / "features/one.zarr").exists()
    again = start(path, "1/3")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert digest(tmp_path / "features") == whole


def test_workers_one_after_another_and_the_last_commits(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, data: Path, whole: str
) -> None:
    path = experiment(tmp_path, clip_dir, llama_dir, data)
    for worker in ("2/3", "0/3", "0/3"):
        result = run(path, "--worker", worker)
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "features/one.zarr").exists()
    assert "15 of 23 shards" in result.output
    assert run(path, "--worker", "1/3").exit_code == 0
    assert digest(tmp_path / "features") == whole


def test_a_plain_run_finishes_what_workers_left(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, data: Path, whole: str
) -> None:
    path = experiment(tmp_path, clip_dir, llama_dir, data)
    assert run(path, "--worker", "1/4").exit_code == 0
    assert run(path, "--worker", "0/3").exit_code == 0
    result = run(path)
    assert result.exit_code == 0, result.output
    assert "resumed at shard" in result.output
    assert digest(tmp_path / "features") == whole


@pytest.mark.skipif("not config.getoption('--slow')")
def test_two_of_the_same_number_do_no_harm(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, data: Path, whole: str
) -> None:
    path = experiment(tmp_path, clip_dir, llama_dir, data)
    tasks = [start(path, worker) for worker in ("0/2", "0/2", "1/2")]
    for task in tasks:
        output, _ = task.communicate(timeout=300)
        assert task.returncode == 0, output
    assert run(path).exit_code == 0
    assert digest(tmp_path / "features") == whole


def test_overwrite_and_workers_exclude_each_other(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, data: Path
) -> None:
    result = run(experiment(tmp_path, clip_dir, llama_dir, data), "--worker", "0/2", "--overwrite")
    assert result.exit_code == 2
    assert "--worker with --overwrite" in result.output


def shard(number: int) -> tuple[np.ndarray, list[Row]]:
    rows = [Row(f"{number}-{place}", "ab" * 32, 0, "", ()) for place in range(4)]
    return np.full((4, 2, 3), number, np.float32), rows


def test_a_lone_process_and_workers_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with open_writer(path, IDENTITY, together=True, **LAYOUT):
        with pytest.raises(UserError, match="another process"), writing(path):
            pass
        with open_writer(path, IDENTITY, together=True, **LAYOUT) as second:
            assert second is not None
    with (
        writing(path),
        pytest.raises(UserError, match="alone"),
        open_writer(path, IDENTITY, together=True, **LAYOUT),
    ):
        pass


def test_workers_of_another_configuration_are_refused(tmp_path: Path) -> None:
    other = Identity({"encoder": {"layer": -1}}, IDENTITY.source)
    with open_writer(tmp_path / "s.zarr", IDENTITY, together=True, **LAYOUT) as writer:
        assert writer is not None
        writer.write(0, *shard(0))
        with (
            pytest.raises(UserError, match="other processes are making it"),
            open_writer(tmp_path / "s.zarr", other, together=True, **LAYOUT),
        ):
            pass
        assert writer.finished(0) == shard(0)[1]


def test_temporary_files_of_the_living_stay(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    torn = partial_path(path) / "features/patch/c/3/0/.tmp-0"
    with open_writer(path, IDENTITY, together=True, **LAYOUT):
        torn.parent.mkdir(parents=True)
        torn.write_bytes(b"half a shard")
        with open_writer(path, IDENTITY, together=True, **LAYOUT):
            assert torn.exists()
    with open_writer(path, IDENTITY, together=True, **LAYOUT):
        assert not torn.exists()


def test_a_shard_is_claimed_once(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    with (
        open_writer(path, IDENTITY, together=True, **LAYOUT) as one,
        open_writer(path, IDENTITY, together=True, **LAYOUT) as two,
    ):
        assert one is not None
        assert two is not None
        with one.claim(0) as mine, two.claim(0) as theirs, two.claim(1) as other:
            assert (mine, theirs, other) == (True, False, True)
        with two.claim(0) as mine:
            assert mine
            one.write(0, *shard(0))
        assert two.recorded() == {0}
        one.commit({})
        assert two.recorded() is None
        with two.claim(1) as mine:
            assert not mine
    assert not partial_path(path).exists()
    with open_writer(path, IDENTITY, together=True, **LAYOUT) as late:
        assert late is None
    assert FeatureCache(path).images == 4


def test_a_commit_that_was_killed_is_made_good_by_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    writer = CacheWriter(path, IDENTITY, **LAYOUT)
    writer.write(0, *shard(0))
    writer.commit({})
    path.rename(partial_path(path))
    with open_writer(path, IDENTITY, together=True, **LAYOUT) as late:
        assert late is None
    assert FeatureCache(path).images == 4
    shutil.rmtree(path)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    with open_writer(tmp_path / "s.zarr", IDENTITY, together=True, **LAYOUT):
        pass
    with (tmp_path / ".s.zarr.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("text", "environment", "worker"),
    [
        ("0/1", {}, Worker(0, 1)),
        ("3/4", {"RANK": "9"}, Worker(3, 4)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "8"}, Worker(2, 8)),
        ("auto", {"RANK": "1", "WORLD_SIZE": "2"}, Worker(1, 2)),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, Worker(3, 4)),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "RANK": "0", "WORLD_SIZE": "2"}, Worker(0, 2)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
            },
            Worker(3, 6),
        ),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "2",
            },
            Worker(1, 3),
        ),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            Worker(2, 3),
        ),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "RANK": "1",
                "WORLD_SIZE": "2",
            },
            Worker(3, 6),
        ),
    ],
)
def test_who_is_who(text: str, environment: dict[str, str], worker: Worker) -> None:
    assert parse(text, environment) == worker


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("4/4", {}, "numbered from 0 to 3"),
        ("0/0", {}, "numbered from 0"),
        ("-1/3", {}, "expected i/n"),
        ("auto", {}, "SLURM_ARRAY_TASK_ID"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x is not a number"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "not below"),
        ("auto", {"SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, "SLURM_PROCID=2 is not below SLURM_NTASKS=2"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}, "--array=0-N"),
    ],
)
def test_unfit_workers_are_named(text: str, environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text, environment)


def test_every_shard_is_somebodys() -> None:
    for count in range(1, 6):
        owners = [[Worker(index, count).owns(shard) for index in range(count)] for shard in range(20)]
        assert all(sum(row) == 1 for row in owners)
