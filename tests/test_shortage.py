"""Memory, threads, files or disk that run out stop a run with one line; the rerun leaves no hole."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any

import caches
import numpy as np
import pytest
from conftest import write_llava
from test_extract import config, run

from fedcmp.extract import decode, shortage
from fedcmp.extract import silo as runner
from fedcmp.pipeline.cache import CorruptCacheError, FeatureCache
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models import device
from fedcmp.pipeline.records import Record

SHORT = [
    (MemoryError(), "not enough memory"),
    (OSError("out of memory error when reading image file"), "not enough memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
    (RuntimeError("can't start new thread"), "no more threads"),
    (OSError(errno.EMFILE, "Too many open files"), "too many open files"),
    (OSError(errno.ENFILE, "Too many open files in system"), "too many open files"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
]


def source(root: Path) -> str:
    path = write_llava(root, 9)
    return f'{{ name = "llava_json", path = "{path}", images = "{root}" }}'


def failures(root: Path) -> list[str]:
    return [item["id"] for item in FeatureCache(root / "features/one.zarr").manifest["failures"]]


@pytest.mark.parametrize(("error", "said"), SHORT)
@pytest.mark.parametrize("owner", [(decode, "read_rgb"), (runner, "_encode"), (Record, "read_image")])
def test_shortage_stops_a_run_and_leaves_no_hole(
    error: Exception,
    said: str,
    owner: tuple[Any, str],
    tmp_path: Path,
    clip_dir: Path,
    llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = config(tmp_path, clip_dir, llama_dir, source(tmp_path))
    whole, calls = getattr(*owner), []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*owner, fail)
        result = run(path)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert "rerun to go on" in result.output
    assert run(path).exit_code == 0
    assert failures(tmp_path) == []


def test_want_of_memory_that_a_decoder_calls_damage(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, clip_dir, llama_dir, source(tmp_path))
    whole = decode.read_rgb

    def crowded(*args: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            raise OSError("broken data stream when reading image file")
        return whole(*args)

    monkeypatch.setattr(decode, "read_rgb", crowded)
    assert run(path).exit_code == 0
    assert failures(tmp_path) == []


def test_damage_is_believed_only_where_there_is_room(
    tmp_path: Path, clip_dir: Path, llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(tmp_path, clip_dir, llama_dir, source(tmp_path))
    (tmp_path / "scans/002.png").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(shortage, "_ROOM", 1 << 62)
        result = run(path)
    assert result.exit_code == 2
    assert "not enough memory" in result.output
    assert run(path).exit_code == 0
    assert failures(tmp_path) == ["scans/002.png"]


def test_no_descriptor_is_kept(tmp_path: Path) -> None:
    stored = caches.features(300)
    cache = caches.write(tmp_path / "many.zarr", stored, shard=1)
    pack(cache.path, tmp_path / "many.zip")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(int(name) for name in os.listdir("/proc/self/fd")) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        for path in (cache.path, tmp_path / "many.zip"):
            opened = FeatureCache(path)
            opened.will_need(range(300))
            assert (opened.read(range(300)) == stored).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    cache = caches.write(tmp_path / "one.zarr", caches.features(8), shard=8)
    cache.read([0])
    os.truncate(cache.path / "features/patch/c/0/0/0", 3)
    with pytest.raises(CorruptCacheError, match="shorter than its manifest says"):
        cache.read([7])


@pytest.mark.parametrize(
    ("rank", "gpus", "wanted"),
    [(None, 4, "cuda"), ("0", 4, "cuda:0"), ("3", 4, "cuda:3"), ("3", 1, "cuda:0"), ("5", 4, "cuda:1")],
)
def test_each_local_rank_has_its_gpu(
    rank: str | None, gpus: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(device, "_has_driver", lambda: True)
    monkeypatch.setattr(device, "_torch_sees_cuda", lambda: True)
    monkeypatch.setattr(device, "_gpus", lambda: gpus)
    assert device.pick_device("auto") == device.pick_device("cuda") == wanted
    assert device.pick_device("cpu") == "cpu"
    assert device.pick_dtype("auto", wanted) == "bfloat16"
    assert provenance(wanted)["device"] == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(UserError, match="LOCAL_RANK=first is not a number"):
        device.pick_device("auto")


def test_ranks_without_gpu_stay_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(device, "_has_driver", lambda: False)
    assert device.pick_device("auto") == "cpu"


def test_texts_of_failed_pictures_do_not_count(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    path = config(tmp_path, clip_dir, llama_dir, source(tmp_path))
    (tmp_path / "scans/002.png").unlink()
    result = run(path)
    assert "one: 1 text on pictures without features, not used" in result.output
    row = next(line for line in result.output.splitlines() if line.startswith("│ one"))
    assert [cell.strip() for cell in row.split("│")][2:5] == ["8", "8", "1"]


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "open"), OSError("file read failed: errno = 5, error")]
)
def test_a_failing_disk_below_hdf5_stops_the_run(
    error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import h5py

    from fedcmp.extract.sources import hdf5

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros((3, 4, 4, 3), np.uint8)
    source = hdf5.Hdf5(path=tmp_path / "a.h5")
    assert len(list(source.records())) == 3

    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(hdf5.Hdf5, "_records", fail)
    with pytest.raises(UserError, match="fix that and rerun to go on"):
        list(source.records_here())
