"""What keeps a cache of millions small in memory and quick to open, on caches small enough to know all of."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import caches
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.cli import main
from fedcmp.federate.arithmetic.bases import canonical_basis
from fedcmp.federate.arithmetic.place import computing_on
from fedcmp.pipeline.cache import CacheWriter, CorruptCacheError, FeatureCache, writer
from fedcmp.pipeline.cache.files import Folder, Ranged
from fedcmp.pipeline.cache.format import CRC_BYTES, INDEX_DTYPE, crc, crc_bytes, images_in, shard_name
from fedcmp.pipeline.cache.strings import Bytes, Strings
from fedcmp.pipeline.cache.verify import verify


def chunks(path: Path, data: bytes, size: int) -> Bytes:
    """The bytes in files of so many."""
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    files = []
    for number, part in enumerate(parts):
        (path / f"{number}").write_bytes(part + b"more")
        files.append(lambda number=number: Ranged(path / f"{number}", 0, size + 4))
    return Bytes([(len(part), file) for part, file in zip(parts, files, strict=True)])


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.text(max_size=9), max_size=30),
    size=st.integers(1, 40),
    places=st.lists(st.integers(0, 400), max_size=20),
)
def test_strings_are_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], size: int, places: list[int]
) -> None:
    data = "".join(words).encode()
    offsets = np.cumsum([0, *(len(word.encode()) for word in words)]).astype(np.int64)
    whole = chunks(tmp_path_factory.mktemp("chunks"), data, size)
    strings = Strings(offsets, whole)
    assert list(strings) == words == strings[:]
    assert strings == words
    assert strings != [*words, "one more"]
    for start in places:
        assert whole[start : start + 7] == data[start : start + 7]
        if start < len(words):
            assert strings[start] == words[start]
            assert strings[start - len(words)] == words[start]
    for index in np.arange(len(words)):
        assert strings[index] == words[index]
    with pytest.raises(IndexError):
        strings[len(words)]


def test_texts_over_many_chunks(tmp_path: Path) -> None:
    """Read in order, at random, and as zarr reads them."""
    import zarr

    cache = caches.write(tmp_path / "s.zarr", caches.features(900), shard=256)
    group = zarr.open_group(cache.path, mode="a", zarr_format=3)
    data = group["texts/bytes"][:]
    offsets = group["texts/offsets"][:]
    order = [*range(cache.texts), *np.random.default_rng(0).permutation(cache.texts).tolist()]
    stored = cache.text_arrays[1]
    assert all(
        stored[int(offsets[n]) : int(offsets[n + 1])] == data[offsets[n] : offsets[n + 1]].tobytes()
        for n in order
    )
    assert cache.ids == [f"é{number}.png" for number in range(900)]


@pytest.mark.parametrize("array", ["texts/bytes", "images/id_bytes"])
def test_a_flipped_byte_is_found_when_its_chunk_is_first_read(tmp_path: Path, array: str) -> None:
    path = caches.write(tmp_path / "s.zarr", caches.features(9)).path
    file = path / array / "c/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    cache = FeatureCache(path)
    with pytest.raises(CorruptCacheError, match="fail their checksum"):
        _ = cache.ids if array.startswith("images") else cache.text(0)


@pytest.mark.parametrize(
    ("images", "options", "files"),
    [
        (11, {}, "e7ea7dad3689fdc5d4053acc1b22b5377e1cd4ce4fb9a49870aa58e7046f0a7b"),
        (
            300,
            {"shard": 64, "failed": (3, 299)},
            "0da54aa2c82d813c4a9ba393ebf9bd2caac8f8c6ed7cb22d4e2abdb05c9410b2",
        ),
    ],
)
def test_caches_have_the_bytes_that_they_always_had(
    tmp_path: Path, images: int, options: dict, files: str
) -> None:
    """Of all that holds data; zarr's own files may change with its version."""
    cache = caches.write(tmp_path / "s.zarr", caches.features(images), **options)
    table = {name: entry for name, entry in sorted(cache.manifest["files"].items()) if "/c/" in name}
    assert hashlib.sha256(json.dumps(table).encode()).hexdigest() == files
    assert verify(cache.path) == []


def test_images_may_lie_in_any_order_in_a_shard(tmp_path: Path) -> None:
    """Not as we write them, but as zarr may."""
    stored = caches.features(7)
    path = caches.write(tmp_path / "s.zarr", stored, shard=4).path
    file = path / shard_name(1)
    data, row = bytearray(file.read_bytes()), stored[0].nbytes + CRC_BYTES
    data[:row], data[row : 2 * row] = data[row : 2 * row], data[:row]
    start = len(data) - CRC_BYTES - 4 * 2 * INDEX_DTYPE.itemsize
    index = np.frombuffer(data[start:-CRC_BYTES], INDEX_DTYPE).reshape(-1, 2).copy()
    index[[0, 1]] = index[[1, 0]]
    data[start:] = index.tobytes() + crc_bytes(crc(index.tobytes()))
    file.write_bytes(data)
    cache = FeatureCache(path)
    for _ in range(2):
        assert np.array_equal(cache.read(np.arange(7)), stored)
    assert cache.places(0)[:2] == [[0, row], [row, row]]
    assert cache.places(1)[:2] == [[row, row], [0, row]]


def test_a_folder_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = caches.write(tmp_path / "s.zarr", caches.features(400), shard=4).path
    asked: list[str] = []
    lstat = os.lstat

    def counting(name: str) -> os.stat_result:
        asked.append(str(name))
        return lstat(name)

    monkeypatch.setattr(os, "lstat", counting)
    FeatureCache(path)
    shards = [name for name in asked if "/features/patch/c/" in name]
    assert len(shards) == 3 * 100
    assert len(asked) == len(set(asked))


def test_links_lead_nowhere_in_whatever_order_they_are_met(tmp_path: Path) -> None:
    path = caches.write(tmp_path / "s.zarr", caches.features(9), shard=4).path
    (path / "features/patch/c/1").rename(tmp_path / "elsewhere")
    (path / "features/patch/c/1").symlink_to(tmp_path / "elsewhere")
    names = [shard_name(0), shard_name(1), shard_name(2), "features/none/c/0", "manifest.json/c"]
    found = dict(Folder(path).sizes(names))
    assert list(found) == names
    assert [found[name] is not None for name in names] == [True, False, True, False, False]
    with pytest.raises(CorruptCacheError, match="c/1/0/0: missing"):
        FeatureCache(path)


@pytest.mark.parametrize("touched", [False, True])
def test_a_shard_is_hashed_again_only_if_it_was_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, touched: bool
) -> None:
    """Also with its old time put back, as the inode's own cannot be."""
    layout = {"patches": 4, "d_vision": 6, "dtype": "bfloat16", "shard_images": 4}
    first = CacheWriter(tmp_path / "s.zarr", caches.identity(), **layout)
    first.write(0, caches.features(4), caches.rows(4))
    file = tmp_path / "s.zarr.partial" / shard_name(0)
    if touched:
        times = file.stat()
        data = bytearray(file.read_bytes())
        data[0] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    hashed: list[Path] = []
    sha256_file = writer.sha256_file
    monkeypatch.setattr(writer, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    again = CacheWriter(tmp_path / "s.zarr", caches.identity(), **layout)
    assert (again.finished(0) is None) == touched
    assert hashed == [file] * touched


def test_a_record_of_an_earlier_version_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = {"patches": 4, "d_vision": 6, "dtype": "bfloat16", "shard_images": 4}
    CacheWriter(tmp_path / "s.zarr", caches.identity(), **layout).write(0, caches.features(4), caches.rows(4))
    record = tmp_path / "s.zarr.partial/_done/00000.json"
    old = json.loads(record.read_text())
    del old["stamp"]
    record.write_text(json.dumps(old))
    again = CacheWriter(tmp_path / "s.zarr", caches.identity(), **layout)
    assert again.finished(0) == caches.rows(4)


def test_an_id_that_is_there_twice_is_found(tmp_path: Path) -> None:
    known = caches.rows(6)
    layout = {"patches": 4, "d_vision": 6, "dtype": "bfloat16", "shard_images": 6}
    again = [*known[:5], known[2]]
    twice = CacheWriter(tmp_path / "s.zarr", caches.identity(), **layout)
    twice.write(0, caches.features(6), again)
    twice.commit({"silo": "s", "skipped": []})
    assert [str(problem) for problem in verify(tmp_path / "s.zarr")] == [
        "images/id_bytes: 'é2.png' is the id of several images"
    ]


def test_shards_by_size(extracted: Path, tmp_path: Path) -> None:
    """The same images in files of so many MB."""
    assert images_in(100, 576, 1024, "bfloat16") == 84
    assert images_in(1e-9, 576, 1024, "int8") == 1
    assert images_in(1e9, 1, 1, "float16") == 1 << 20
    words = ["--set", f"features={tmp_path}", "--set", "extract.shard_mb=0.002", "--silo", "clinic"]
    result = CliRunner().invoke(main, ["extract", str(extracted), *words])
    assert result.exit_code == 0, result.output
    ours = FeatureCache(tmp_path / "clinic.zarr")
    theirs = FeatureCache(extracted.parent / "features/clinic.zarr")
    number = images_in(0.002, ours.patches, ours.d_vision, "bfloat16")
    assert ours.manifest["shard_images"] == number
    assert 1 < number < ours.images
    sizes = [(ours.path / shard_name(shard)).stat().st_size for shard in range(ours.images // number)]
    assert max(sizes) <= 2000
    assert ours.ids == theirs.ids
    assert np.array_equal(ours.read(range(ours.images)), theirs.read(range(theirs.images)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_bases_of_a_gpu_are_those_of_the_cpu() -> None:
    draw = torch.randn(300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = draw @ draw.T
    here = canonical_basis(gram, rank=40)
    with computing_on("cuda"):
        there = canonical_basis(gram, rank=40)
    torch.testing.assert_close(there[1], here[1])
    torch.testing.assert_close(there[0] @ there[0].T, here[0] @ here[0].T)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_before_anything_is_done(extracted: Path, tmp_path: Path) -> None:
    words = ["--set", f"build={tmp_path}", "--set", "federate.aggregation=cuda"]
    result = CliRunner().invoke(main, ["federate", str(extracted), *words])
    assert (result.exit_code, "torch sees no CUDA device here; use 'cpu'" in result.output) == (2, True)
    assert not list(tmp_path.rglob("*"))
