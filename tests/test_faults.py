"""Kills, full disks and flipped bytes: nothing half-written is taken for whole, nothing false is used."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import caches
import pytest
import torch
from conftest import ROOT, digest

from fedcmp.pipeline.cache import FeatureCache, Quantiser
from fedcmp.pipeline.cache.verify import verify
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.pack import pack


def test_kills_at_any_moment() -> None:
    command = [sys.executable, ROOT / "tests/soak_kills.py", "--kills", "64"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = [int(line.split("killed ")[1].split()[0]) for line in result.stdout.splitlines()]
    assert len(counts) == 8
    assert min(counts) >= 8


def used(path: Path) -> list[object]:
    """All that training takes from a cache."""
    cache = FeatureCache(path)
    taken: list[object] = [cache.patches, cache.d_vision, cache.cache_key]
    for split in ("train", "test"):
        for index in cache.usable_texts(split):
            row = cache.text_image[index]
            taken += [cache.text(index), cache.ids[row], cache.tensor([row])]
    return taken


def same(ours: list[object], theirs: list[object]) -> bool:
    def equal(one: object, two: object) -> bool:
        if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
            return torch.equal(one, two)
        return one == two

    return len(ours) == len(theirs) and all(map(equal, ours, theirs))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_every_flipped_byte_is_found_and_none_is_trained_on(tmp_path: Path, dtype: str) -> None:
    stored, quantiser = caches.features(14), None
    if dtype == "int8":
        exact = torch.from_numpy(stored).view(torch.bfloat16).float().numpy()
        quantiser = Quantiser.fit(exact)
        stored = quantiser.encode(exact)
    path = caches.write(tmp_path / "s.zarr", stored, failed=(4,), quantiser=quantiser).path
    right, rng = used(path), random.Random(dtype)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = [file.stat().st_size for file in files]
    refused = 0
    for number in range(200):
        # Any byte of the cache alike, and any file alike, as features would take nearly all.
        (file,) = rng.choices(files, sizes if number % 2 else None)
        whole = file.read_bytes()
        position = rng.randrange(len(whole))
        damaged = bytearray(whole)
        damaged[position] ^= rng.randrange(1, 256)
        file.write_bytes(damaged)
        problems = verify(path)
        assert problems, (file, position)
        assert any(problem.file in str(file) for problem in problems), (file, problems)
        try:
            assert same(used(path), right), (file, position)
        except UserError:
            refused += 1
        file.write_bytes(whole)
    assert refused > 40
    assert verify(path) == []


@pytest.fixture
def small(tmp_path: Path) -> tuple[list[str], Path]:
    """How to run something with a disk of 200 kB, and where that is."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=200k tmpfs {disk} && mkdir {disk}/in"
    probe = subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True)
    if probe.returncode:
        pytest.skip("mounting a tmpfs is not permitted here; the limit on file sizes below is")
    return [
        "unshare",
        "-m",
        "sh",
        "-c",
        f'{mount} && "$@"; code=$?; find {disk} -type f; exit $code',
        "sh",
    ], disk


@pytest.mark.parametrize("operation", ["unpack", "merge", "pack"])
def test_a_full_disk(tmp_path: Path, small: tuple[list[str], Path], operation: str) -> None:
    prefix, disk = small
    cache = caches.write(tmp_path / "s.zarr", caches.features(40, 64, 64))
    packed = pack(cache.path, tmp_path / "p.zip").path
    words = {
        "unpack": ["unpack", packed, "--to", disk / "in"],
        "merge": ["merge", cache.path, "--out", disk / "in/m.zarr"],
        "pack": ["pack", cache.path, "--out", disk / "in/p.zip"],
    }[operation]
    command = [*prefix, sys.executable, "-m", "fedcmp", "cache", *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2, result.stderr
    assert "free some space and rerun to go on" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    left = [Path(line) for line in result.stdout.splitlines()]
    assert not [file for file in left if file.name in ("manifest.json", "p.zip")]


@pytest.mark.parametrize("operation", ["unpack", "merge", "pack", "subset"])
def test_a_file_that_cannot_grow_then_can(tmp_path: Path, operation: str) -> None:
    cache = caches.write(tmp_path / "s.zarr", caches.features(40, 64, 64), shard=10)
    pack(cache.path, tmp_path / "p.zip")
    out = tmp_path / "out"
    words = {
        "unpack": ["unpack", tmp_path / "p.zip", "--to", out],
        "merge": ["merge", cache.path, "--out", out / "p.zarr"],
        "subset": ["subset", cache.path, "--out", out / "p.zarr", "--number", 40],
        "pack": ["pack", cache.path, "--out", out / "p.zarr"],
    }[operation]
    command = [sys.executable, "-m", "fedcmp", "cache", *map(str, words)]
    limit = 50_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=limited)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "File too large" in result.stderr
    assert not (out / "p.zarr").exists()
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    if operation == "pack":
        assert (out / "p.zarr").read_bytes() == (tmp_path / "p.zip").read_bytes()
    else:
        assert verify(out / "p.zarr") == []
        assert digest(out / "p.zarr/features") == digest(cache.path / "features")
    left = {name for name in os.listdir(out) if not name.endswith((".lock", ".verified.json"))}
    assert left == {"p.zarr"}


def test_extraction_on_a_full_disk(tmp_path: Path) -> None:
    """The writer stops with what it has, and goes on from there."""
    path = tmp_path / "s.zarr"
    code = "import caches; from pathlib import Path; caches.write(Path({!r}), caches.features(40, 64, 64))"
    command = [sys.executable, "-c", code.format(str(path))]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = subprocess.run(command, capture_output=True, env=environment, preexec_fn=limited)
    assert result.returncode != 0
    assert not path.exists()
    assert subprocess.run(command, capture_output=True, env=environment).returncode == 0
    whole = caches.write(tmp_path / "whole" / "s.zarr", caches.features(40, 64, 64))
    assert digest(path) == digest(whole.path)
    assert json.loads((path / "manifest.json").read_bytes()) == whole.manifest
