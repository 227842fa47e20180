from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.pipeline.cache import (
    CacheWriter,
    CorruptCacheError,
    FeatureCache,
    Identity,
    Row,
    differences,
    finish_commit,
    partial_path,
    same_key,
    to_storage,
    writing,
)
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import write_atomic

IDENTITY = Identity({"encoder": {"layer": -2}, "dtype": "bfloat16"}, {"files": "abc"})


def rows(start: int, number: int) -> list[Row]:
    return [
        Row(f"é{i}.png", "ab" * 32, 0, "", (("caption", "train", f"ein Bild {i}"),) * (i % 3))
        for i in range(start, start + number)
    ]


def write(path: Path, features: np.ndarray, identity: Identity = IDENTITY, shard: int = 4) -> FeatureCache:
    images, patches, width = features.shape
    dtype = {"uint16": "bfloat16", "float16": "float16", "float32": "float32"}[features.dtype.name]
    writer = CacheWriter(path, identity, patches=patches, d_vision=width, dtype=dtype, shard_images=shard)
    starts = range(0, images, shard)
    for number, start in enumerate(starts):
        part = features[start : start + shard]
        writer.write(number, part, rows(start, len(part)))
    return writer.commit({"silo": "test"})


def some(images: int = 10, dtype: str = "bfloat16", patches: int = 3, width: int = 5) -> np.ndarray:
    generator = torch.Generator().manual_seed(images)
    return to_storage(torch.randn(images, patches, width, generator=generator), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_zarr_python_reads_what_we_write(tmp_path: Path, dtype: str) -> None:
    features = some(dtype=dtype)
    cache = write(tmp_path / "s.zarr", features)
    group = zarr.open_group(tmp_path / "s.zarr", mode="r", zarr_format=3)
    np.testing.assert_array_equal(group["features/patch"][:], features)
    assert group["features/patch"].attrs["logical_dtype"] == dtype
    np.testing.assert_array_equal(cache.read(range(10)), features)
    assert cache.tensor([3]).dtype == getattr(torch, dtype)


def test_we_read_what_zarr_python_writes(tmp_path: Path) -> None:
    cache = write(tmp_path / "s.zarr", some())
    other = some(10)[::-1].copy()
    group = zarr.open_group(tmp_path / "s.zarr", mode="r+", zarr_format=3)
    group["features/patch"][:] = other
    np.testing.assert_array_equal(FeatureCache(cache.path).read(range(10)), other)


@settings(max_examples=25, deadline=None)
@given(images=st.integers(1, 20), shard=st.integers(1, 7), order=st.randoms())
def test_any_order_of_any_rows(tmp_path_factory, images: int, shard: int, order) -> None:  # type: ignore[no-untyped-def]
    features = some(images)
    cache = write(tmp_path_factory.mktemp("c") / "s.zarr", features, shard=shard)
    wanted = [order.randrange(images) for _ in range(images)]
    np.testing.assert_array_equal(cache.read(wanted), features[wanted])
    assert cache.ids == [f"é{i}.png" for i in range(images)]
    assert cache.texts == sum(i % 3 for i in range(images))
    for index in range(cache.texts):
        assert cache.text(index).turns[0].content == f"ein Bild {cache.text_image[index]}"


def test_bfloat16_is_bit_exact(tmp_path: Path) -> None:
    features = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache = write(tmp_path / "s.zarr", to_storage(features, "bfloat16"))
    assert torch.equal(cache.tensor(range(4)), features)


def test_without_manifest_it_is_no_cache(tmp_path: Path) -> None:
    cache = write(tmp_path / "s.zarr", some())
    (cache.path / "manifest.json").unlink()
    with pytest.raises(UserError, match="does not exist; run 'fedcmp extract'"):
        FeatureCache(cache.path)


def test_every_flipped_feature_byte_is_found(tmp_path: Path) -> None:
    cache = write(tmp_path / "s.zarr", some(4))
    shard = cache.path / "features/patch/c/0/0/0"
    whole = shard.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        shard.write_bytes(damaged)
        with pytest.raises(CorruptCacheError, match=r"c/0/0/0.*checksum"):
            FeatureCache(cache.path).read(range(4))
    shard.write_bytes(whole)
    FeatureCache(cache.path).read(range(4))


@pytest.mark.parametrize("name", ["texts/bytes", "texts/offsets", "texts/image_index", "images/id_bytes"])
def test_a_flipped_byte_in_texts_or_ids_is_found(tmp_path: Path, name: str) -> None:
    cache = write(tmp_path / "s.zarr", some())
    (chunk,) = (file for file in (cache.path / name / "c").rglob("*") if file.is_file())
    damaged = bytearray(chunk.read_bytes())
    damaged[3] ^= 1
    chunk.write_bytes(damaged)

    def use(damaged_cache: FeatureCache) -> tuple[object, ...]:
        return damaged_cache.ids, damaged_cache.usable_texts("train"), damaged_cache.text(0)

    with pytest.raises(CorruptCacheError, match=rf"{name}.*--overwrite"):
        use(FeatureCache(cache.path))


def test_truncated_missing_or_linked_files_are_refused(tmp_path: Path) -> None:
    cache = write(tmp_path / "s.zarr", some())
    shard = cache.path / "features/patch/c/1/0/0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(CorruptCacheError, match="c/1/0/0"):
        FeatureCache(cache.path)
    shard.unlink()
    with pytest.raises(CorruptCacheError, match="c/1/0/0"):
        FeatureCache(cache.path)
    (tmp_path / "elsewhere").write_bytes(whole)
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCacheError, match="c/1/0/0"):
        FeatureCache(cache.path)


def test_an_unfinished_cache_is_resumed_by_shard(tmp_path: Path) -> None:
    features = some(10)
    whole = write(tmp_path / "whole" / "s.zarr", features)
    path = tmp_path / "s.zarr"
    writer = CacheWriter(path, IDENTITY, patches=3, d_vision=5, dtype="bfloat16", shard_images=4)
    writer.write(0, features[:4], rows(0, 4))
    writer.write(1, features[4:8], rows(4, 4))
    torn = partial_path(path) / "features/patch/c/1/0/0"
    torn.write_bytes(torn.read_bytes()[:-3])
    with pytest.raises(UserError, match="unfinished"):
        FeatureCache(path)
    writer = CacheWriter(path, IDENTITY, patches=3, d_vision=5, dtype="bfloat16", shard_images=4)
    assert writer.finished(0) == rows(0, 4)
    assert writer.finished(1) is None
    assert writer.finished(2) is None
    writer.write(1, features[4:8], rows(4, 4))
    writer.write(2, features[8:], rows(8, 2))
    cache = writer.commit({"silo": "test"})
    assert cache.manifest == whole.manifest
    assert not (path / "_done").exists()


def test_another_identity_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    writer = CacheWriter(path, IDENTITY, patches=3, d_vision=5, dtype="bfloat16", shard_images=4)
    writer.write(0, some(4), rows(0, 4))
    other = Identity({"encoder": {"layer": -1}}, IDENTITY.source)
    writer = CacheWriter(path, other, patches=3, d_vision=5, dtype="bfloat16", shard_images=4)
    assert writer.finished(0) is None


def test_two_writers_on_one_silo(tmp_path: Path) -> None:
    with (
        writing(tmp_path / "s.zarr"),
        pytest.raises(UserError, match="another process"),
        writing(tmp_path / "s.zarr"),
    ):
        pass
    with writing(tmp_path / "s.zarr"):
        pass


@pytest.mark.parametrize("moment", ["after the arrays", "before the manifest", "after the manifest"])
def test_a_commit_killed_anywhere_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    whole = write(tmp_path / "whole" / "s.zarr", some(10))
    target = {
        "after the arrays": "fedcmp.pipeline.cache.writer.sha256_file",
        "before the manifest": "fedcmp.pipeline.cache.writer.write_atomic",
        "after the manifest": "fedcmp.pipeline.cache.writer.finish_commit",
    }[moment]
    path = tmp_path / "s.zarr"

    def resume() -> FeatureCache:
        writer = CacheWriter(path, IDENTITY, patches=3, d_vision=5, dtype="bfloat16", shard_images=4)
        for shard, start in enumerate(range(0, 10, 4)):
            if writer.finished(shard) is None:
                part = some(10)[start : start + 4]
                writer.write(shard, part, rows(start, len(part)))
        return writer.commit({"silo": "test"})

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    real_write_atomic = write_atomic
    if moment == "before the manifest":

        def kill_at_manifest(file: Path, data: bytes) -> None:
            if file.name == "manifest.json":
                raise Killed
            real_write_atomic(file, data)

        monkeypatch.setattr(target, kill_at_manifest)
    else:
        monkeypatch.setattr(target, kill)
    with pytest.raises(Killed):
        resume()
    monkeypatch.undo()
    assert not path.exists()
    finish_commit(path)
    cache = FeatureCache(path) if path.exists() else resume()
    assert cache.manifest == whole.manifest
    np.testing.assert_array_equal(cache.read(range(10)), some(10))


def test_no_shard_is_dropped_at_commit(tmp_path: Path) -> None:
    writer = CacheWriter(
        tmp_path / "s.zarr", IDENTITY, patches=3, d_vision=5, dtype="bfloat16", shard_images=4
    )
    writer.write(1, some(4), rows(4, 4))
    with pytest.raises(ValueError, match="only the shards"):
        writer.commit({})


def test_an_interrupted_commit_is_completed(tmp_path: Path) -> None:
    new = write(tmp_path / "new.zarr", some(6))
    write(tmp_path / "s.zarr", some(10))
    new.path.rename(partial_path(tmp_path / "s.zarr"))
    finish_commit(tmp_path / "s.zarr")
    assert FeatureCache(tmp_path / "s.zarr").images == 6
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["s.zarr"]


def test_wrong_shape_or_dtype_is_refused(tmp_path: Path) -> None:
    writer = CacheWriter(
        tmp_path / "s.zarr", IDENTITY, patches=3, d_vision=5, dtype="bfloat16", shard_images=4
    )
    with pytest.raises(ValueError, match="expected uint16"):
        writer.write(0, np.zeros((4, 3, 5), np.float32), rows(0, 4))
    with pytest.raises(ValueError, match=r"\(4, 3, 5\)"):
        writer.write(0, np.zeros((3, 3, 5), np.uint16), rows(0, 4))


def test_caches_of_two_encoders_are_not_mixed(tmp_path: Path) -> None:
    one = write(tmp_path / "a.zarr", some())
    two = write(tmp_path / "b.zarr", some(), Identity({"encoder": {"layer": -1}}, {}))
    with pytest.raises(UserError, match=r"'a' and 'b'.*encoder.layer: -2 here, -1 there"):
        same_key({"a": one, "b": two})


def test_differences_name_leaves() -> None:
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2}) == ["a.b: 1 here, 3 there"]
    assert differences({"a": 1}, {"a": 1.0}) == ["a: 1 here, 1.0 there"]
    assert differences({"a": 1}, {}) == ["a: 1 here, null there"]


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    cache = write(tmp_path / "s.zarr", some())
    on_disk = {str(file.relative_to(cache.path)) for file in cache.path.rglob("*") if file.is_file()}
    assert on_disk == set(cache.manifest["files"]) | {"manifest.json"}
    json.dumps(cache.manifest)
    shutil.rmtree(cache.path)


def test_what_zarr_left_when_it_was_killed_is_not_taken_in(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole" / "s.zarr", some(10))
    path = tmp_path / "s.zarr"
    writer = CacheWriter(path, IDENTITY, patches=3, d_vision=5, dtype="bfloat16", shard_images=4)
    for name in ("zarr.json.0b1c.partial", "texts/bytes/c/0.77aa.partial", "texts/bytes/c/9"):
        (partial_path(path) / name).parent.mkdir(parents=True, exist_ok=True)
        (partial_path(path) / name).write_bytes(b"half")
    for shard, start in enumerate(range(0, 10, 4)):
        part = some(10)[start : start + 4]
        writer.write(shard, part, rows(start, len(part)))
    assert writer.commit({"silo": "test"}).manifest == whole.manifest
