"""Batches read ahead: the very numbers, in the very order, in little memory."""

from __future__ import annotations

import threading
from pathlib import Path

import caches
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.pipeline.cache import CorruptCacheError, FeatureCache, Quantiser
from fedcmp.pipeline.cache.loader import float_batches, stored_batches
from fedcmp.pipeline.handover.pack import pack

CPU = torch.device("cpu")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "features"]


@settings(max_examples=20, deadline=None)
@given(
    number=st.integers(0, 25),
    batch=st.integers(1, 9),
    dtype=st.sampled_from(["uint16", "float16", "float32"]),
    order=st.randoms(),
)
def test_any_order_gives_what_was_written(tmp_path_factory, number, batch, dtype, order) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path_factory.mktemp("loader")
    stored = [caches.features(n, seed=n) for n in (7, 5)]
    stored = stored if dtype == "uint16" else [each.astype(dtype) for each in stored]
    silos = [caches.write(root / f"{place}.zarr", each) for place, each in enumerate(stored)]
    samples = [[silo := order.randrange(2), order.randrange(len(stored[silo]))] for _ in range(number)]
    wanted = [silos[silo].tensor([row]).float() for silo, row in samples]
    found = list(float_batches(silos, np.array(samples).reshape(-1, 2), batch, CPU))
    assert [len(each) for each in found[:-1]] == [batch] * max(-(-number // batch) - 1, 0)
    if number:
        assert torch.equal(torch.cat(found), torch.cat(wanted))
    assert threads() == []


def test_folder_and_zip_give_the_same(tmp_path: Path) -> None:
    cache = caches.write(tmp_path / "s.zarr", caches.features(9))
    packed = FeatureCache(pack(cache.path, tmp_path / "s.zip").path)
    samples = np.stack([np.zeros(9, int), np.random.default_rng(0).permutation(9)], 1)
    for ours, theirs in zip(
        float_batches([cache], samples, 4, CPU), float_batches([packed], samples, 4, CPU), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_int8_of_several_silos(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    silos = []
    for place in range(2):
        exact = (1 + 9 * place) * rng.standard_normal((5, 4, 6), np.float32)
        quantiser = Quantiser.fit(exact)
        silos.append(caches.write(tmp_path / f"{place}.zarr", quantiser.encode(exact), quantiser=quantiser))
    samples = np.array([[0, 1], [1, 1], [1, 4], [0, 0]])
    wanted = torch.cat([silos[silo].tensor([row]) for silo, row in samples])
    assert torch.equal(torch.cat(list(float_batches(silos, samples, 3, CPU))), wanted)


def test_few_buffers_are_used_again(tmp_path: Path) -> None:
    cache = caches.write(tmp_path / "s.zarr", caches.features(40))
    samples = np.stack([np.zeros(40, int), np.arange(40)], 1)
    places = {batch.data_ptr() for batch in stored_batches([cache], samples, 2)}
    assert len(places) <= 2


def test_stopping_early_ends_the_thread(tmp_path: Path) -> None:
    cache = caches.write(tmp_path / "s.zarr", caches.features(40))
    samples = np.stack([np.zeros(40, int), np.arange(40)], 1)
    for taken in (0, 1, 5):
        batches = stored_batches([cache], samples, 2)
        for _ in range(taken):
            next(batches)
        batches.close()
        assert threads() == []


def test_damage_reaches_whoever_asked(tmp_path: Path) -> None:
    cache = caches.write(tmp_path / "s.zarr", caches.features(8))
    shard = cache.path / "features/patch/c/1/0/0"
    damaged = bytearray(shard.read_bytes())
    damaged[7] ^= 1
    shard.write_bytes(damaged)
    samples = np.stack([np.zeros(8, int), np.arange(8)], 1)
    batches = stored_batches([FeatureCache(cache.path)], samples, 2)
    assert [len(next(batches)) for _ in range(2)] == [2, 2]
    with pytest.raises(CorruptCacheError, match=r"c/1/0/0.*é4\.png"):
        next(batches)
    assert threads() == []
