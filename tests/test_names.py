"""Names from elsewhere stay in their folder; files that claim much take little."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import caches
import h5py
import numpy as np
import pytest
from conftest import ROOT, picture

from fedcmp.extract.silo import _only_records
from fedcmp.extract.sources.base import Skipped, Source
from fedcmp.extract.sources.hdf5 import Hdf5
from fedcmp.extract.sources.webdataset import WebDataset
from fedcmp.pipeline.cache import CacheWriter, CorruptCacheError, FeatureCache, Row
from fedcmp.pipeline.cache.verify import verify
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.receive import received
from fedcmp.pipeline.handover.unpack import unpack
from fedcmp.pipeline.records import Record, improper

BAD = [
    "../../x",
    "a/../../x",
    "..",
    "..\\..\\x",
    "a\\..\\x",
    "/etc/passwd",
    "\\\\server\\x",
    "C:\\x",
    "c:x",
    "a\0.png",
    "a\nb.png",
    "\x1b[2Jx",
    "\x9b2J",
    "a\u2028b",
    "",
]
GOOD = [
    "x.png",
    "scans/001.png",
    "é.png",
    "a..b.png",
    "..a",
    "2024-01-01T10:00.png",
    "a b/c\u200dd.jpg",
    "./x",
]


@pytest.mark.parametrize("name", BAD)
def test_no_image_is_called_so(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.zarr"
    writer = CacheWriter(path, caches.identity(), patches=4, d_vision=6, dtype="bfloat16", shard_images=4)
    rows = [Row("a.png", "0" * 64, 0, "", ()), Row(name, "0" * 64, 0, "", (("caption", "train", "x"),))]
    writer.write(0, caches.features(2), rows)
    writer.commit({"silo": "s", "skipped": []})
    (problem,) = verify(path)
    assert "cannot name an image" in str(problem)
    assert str(problem).isprintable()
    pack(path, tmp_path / "p.zip")
    for use in (
        lambda: FeatureCache(path).ids,
        lambda: unpack(tmp_path / "p.zip", tmp_path / "r.zarr"),
        lambda: received(tmp_path / "p.zip"),
    ):
        with pytest.raises(CorruptCacheError, match="cannot name an image") as caught:
            use()
        assert str(caught.value).isprintable()
    assert not (tmp_path / "r.zarr").exists()


@pytest.mark.parametrize("name", GOOD)
def test_an_image_may_be_called_so(name: str) -> None:
    assert improper(name) is None


def test_such_records_are_listed_and_not_encoded() -> None:
    class Named(Source):
        def records(self) -> Iterator[Record | Skipped]:
            yield from (Record(name, b"", ()) for name in [*BAD, *GOOD])

        def identity(self) -> dict[str, str]:
            return {}

        def size(self) -> None:
            return None

    skipped: list[Skipped] = []
    assert [record.id for record in _only_records(Named(), skipped)] == GOOD
    assert len(skipped) == len(BAD)
    assert all(each.place.isprintable() and "its name cannot be" in each.reason for each in skipped)


def member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def zeros(size: int) -> Iterator[bytes]:
    for _ in range(size >> 20):
        yield bytes(1 << 20)


def tar(path: Path, parts: list[bytes | int], squeeze: bool) -> Path:
    """Parts one after the other, numbers as so many zeros; then one good sample."""
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as archive:
        for name, data in (("good.png", picture(0)), ("good.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with gzip.open(path, "wb", 6) if squeeze else path.open("wb") as file:
        for part in parts:
            for block in zeros(part) if isinstance(part, int) else [part]:
                file.write(block)
        file.write(good.getvalue())
    return path


def sparse(size: int) -> bytes:
    """A header of GNU tar that says: no data, and this many bytes of nothing."""
    header = bytearray(member("a.png", 0, tarfile.GNUTYPE_SPARSE))
    header[386 : 386 + 24] = b"%011o\0%011o\0" % (0, 0)
    header[483:495] = b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


PROBE = """
import sys
from fedcmp.extract.sources.base import Skipped
from fedcmp.extract.sources.webdataset import WebDataset
def peak():
    return 1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = peak()
for each in WebDataset(path=sys.argv[1]).records():
    print(f"skipped {each.reason}" if isinstance(each, Skipped) else f"record {each.id}")
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("kind", "words", "good"),
    [
        ("large", "its 570425344 bytes are more than", True),
        ("squeezed", "its 570425344 bytes are more than", False),
        ("many", "no pictures do that", False),
        ("name", "a name of 1073741824 bytes", False),
        ("sparse", "a sparse file", True),
        ("promise", "damaged shard: unexpected end of data", False),
    ],
)
def test_bombs_in_tars_take_little_memory(tmp_path: Path, kind: str, words: str, good: bool) -> None:
    gib = 1 << 30
    parts: list[bytes | int] = {
        "large": [member("a.png", 544 << 20), 544 << 20],
        "squeezed": [member("a.png", 544 << 20), 544 << 20],
        "many": [part for n in range(8) for part in (member(f"{n}.png", gib >> 4), gib >> 4)],
        "name": [member("a", gib, tarfile.GNUTYPE_LONGNAME), gib],
        "sparse": [sparse(gib >> 3) for _ in range(50)],
        "promise": [member("a.png", gib >> 2)],
    }[kind]  # type: ignore[assignment]
    path = tar(tmp_path / "0.tar", parts, kind not in ("large", "sparse", "promise"))
    assert kind == "large" or path.stat().st_size < 2_000_000
    result = subprocess.run(
        [sys.executable, "-c", PROBE, path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    *lines, grown = result.stdout.splitlines()
    assert any(words in line for line in lines), (lines, result.stderr)
    assert ("record good.png" in lines) == good
    assert int(grown) < 400 << 20


def test_a_header_that_is_damaged_does_not_end_a_shard_quietly(tmp_path: Path) -> None:
    path = tar(tmp_path / "0.tar", [], False)
    data = bytearray(path.read_bytes())
    data[data.index(b"good.txt") + 148] ^= 1
    path.write_bytes(data)
    found = list(WebDataset(path=str(path)).records())
    assert [each.reason for each in found if isinstance(each, Skipped)] == ["damaged shard: bad checksum"]


@pytest.mark.parametrize("what", ["rows", "picture", "chunk"])
def test_hdf5_that_claims_more_than_it_holds(tmp_path: Path, what: str) -> None:
    shapes = {"rows": (10**12, 4, 4, 3), "picture": (3, 1 << 20, 1 << 20, 3), "chunk": (3, 20_000, 10_000, 3)}
    chunks = (3, 20_000, 10_000, 3) if what == "chunk" else None if what == "rows" else (1, 8, 8, 3)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file.create_dataset(
            "images", shapes[what], np.uint8, chunks=chunks, compression="gzip" if chunks else None
        )
    with pytest.raises(UserError, match="more than such a file can hold"):
        list(Hdf5(path=tmp_path / "p.h5").records())
