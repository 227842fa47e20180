"""Damages caches, HDF5, Parquet, Arrow streams and tars in seeded ways and uses each.

Run as a program: what is no UserError of one line is printed, and the memory that it took at its peak.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import caches
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedcmp.extract.sources.hdf5 import Hdf5
from fedcmp.extract.sources.parquet import Parquet
from fedcmp.extract.sources.webdataset import WebDataset
from fedcmp.pipeline import apart
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.cache.format import render_manifest, seal_manifest
from fedcmp.pipeline.cache.inspect import difference, inspection, summary
from fedcmp.pipeline.cache.writer import file_table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.receive import received
from fedcmp.pipeline.handover.unpack import unpack

DEEP = "[" * 50_000
VALUES = [None, True, -1, 0, 1.5, 10**6, 10**18, 2**63, "", "x", "\x1b[2J", [], [[]], {}, {"a": {}}, DEEP]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Damage of bytes: flips, runs, cuts, insertions and swaps, half of them near the end."""
    out = bytearray(data)
    if not out:
        return b"\0"
    kind = rng.choice(["flip", "flip", "flips", "run", "cut", "insert", "swap", "numbers"])
    at = rng.randrange(len(out))
    if rng.random() < 0.5:
        at = max(0, len(out) - 1 - rng.randrange(1 + min(len(out) - 1, 600)))
    if kind == "flip":
        out[at] ^= 1 << rng.randrange(8)
    elif kind == "flips":
        for _ in range(rng.randrange(2, 30)):
            out[rng.randrange(len(out))] = rng.randrange(256)
    elif kind == "run":
        out[at : at + rng.randrange(1, 64)] = bytes([rng.choice([0, 255])]) * rng.randrange(1, 64)
    elif kind == "cut":
        del out[at:]
    elif kind == "insert":
        out[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == "swap":
        other = rng.randrange(len(out))
        one, two = out[at : at + 16], out[other : other + 16]
        out[at : at + 16], out[other : other + 16] = two, one
    else:
        out[at : at + 8] = rng.choice([2**31, 2**32 - 1, 2**40, 2**63 - 1]).to_bytes(8, "little")
    return bytes(out)


def changed_json(value: object, rng: random.Random) -> object:
    """A JSON value with another somewhere in it."""
    places: list[tuple[object, object]] = []

    def walk(each: object) -> None:
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            places.append((each, key))
            walk(each[key])  # type: ignore[index]

    walk(value)
    if places:
        parent, key = rng.choice(places)
        parent[key] = rng.choice(VALUES)  # type: ignore[index]
    return value


def forge(folder: Path, rng: random.Random) -> None:
    """What somebody does who makes all hashes fit: change a small file or the manifest, and seal it again."""
    names = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")
    file = rng.choice(names)
    if rng.random() < 0.6:
        if file.name == "zarr.json":
            file.write_text(json.dumps(changed_json(json.loads(file.read_bytes()), rng)))
        else:
            file.write_bytes(flipped(file.read_bytes(), rng))
            if rng.random() < 0.7 and file.stat().st_size > 4:
                from fedcmp.pipeline.cache.format import crc, crc_bytes

                body = file.read_bytes()[:-4]
                file.write_bytes(body + crc_bytes(crc(body)))
        manifest = json.loads((folder / "manifest.json").read_bytes())
        manifest["files"] = file_table(folder, {})
    else:
        manifest = changed_json(json.loads((folder / "manifest.json").read_bytes()), rng)  # type: ignore[assignment]
    try:
        (folder / "manifest.json").write_bytes(render_manifest(seal_manifest(manifest)))
    except (RecursionError, UnicodeEncodeError, AttributeError):
        (folder / "manifest.json").write_text(json.dumps(manifest))


def rezipped(source: Path, out: Path, rng: random.Random) -> None:
    """The members of a zip exchanged, twice, compressed, renamed, left out or with sizes that lie."""
    kind = rng.choice(["exchange", "twice", "deflate", "rename", "leave", "more", "bomb"])
    with zipfile.ZipFile(source) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    one, two = rng.randrange(len(members)), rng.randrange(len(members))
    if kind == "exchange":
        members[one], members[two] = (members[one][0], members[two][1]), (members[two][0], members[one][1])
    elif kind == "twice":
        members.append(members[one])
    elif kind == "rename":
        name = rng.choice(["../x", "/etc/x", "a\\b", "C:x", "\x1b[2J", "x\ny", members[two][0] + ".zst"])
        members[one] = (name, members[one][1])
    elif kind == "leave":
        del members[one]
    elif kind == "more":
        members.append(("manifest.sig", rng.choice([b"", bytes(64), b"[" * 900, bytes(5000)])))
    elif kind == "bomb":
        members[one] = (members[one][0], bytes(1 << 24))
    with zipfile.ZipFile(out, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (name, data) in enumerate(members):
            squeezed = kind in ("deflate", "bomb") and number == one
            new.writestr(name, data, zipfile.ZIP_DEFLATED if squeezed else zipfile.ZIP_STORED)


def use(path: Path) -> None:
    """Everything that is done with a cache, also by commands that do not verify it."""
    for look in (summary, lambda p: inspection(p, sample=4, texts=3), lambda p: difference(p, p)):
        allowed(look, path)  # type: ignore[arg-type]
    for opening in (FeatureCache, received):
        allowed(lambda p: read(opening(p)), path)  # noqa: B023


def read(cache: FeatureCache) -> None:
    _ = cache.ids, cache.status, cache.usable_texts("train")
    for index in range(cache.texts):
        cache.text(index)
    cache.read(range(cache.images))


class Found:
    """What went wrong, and how much was tried."""

    tried = 0
    refused = 0
    where = ""
    faults: ClassVar[list[str]] = []


def allowed(work: Callable[[Path], object], path: Path) -> None:
    """Let it work or be refused in one line; anything else is a fault."""
    try:
        work(path)
    except UserError as error:
        Found.refused += 1
        if not str(error).isprintable() or len(str(error)) > 2000:
            Found.faults.append(f"{Found.where}: {str(error)[:300]!r}")
    except MemoryError:
        Found.faults.append(f"{Found.where}: MemoryError")
    except Exception:
        Found.faults.append(f"{Found.where}: {traceback.format_exc()[-900:]}")


def cases(kind: str, root: Path, rng: random.Random) -> Iterator[Callable[[Path], None]]:
    """One damaged file after the other, each given as what uses it."""
    whole = caches.write(root / "whole" / "s.zarr", caches.features(6), failed=(2,)).path
    stored = pack(whole, root / "stored.zip").path
    hdf5 = pack(whole, root / "s.h5", hdf5=True).path
    place = root / "now"

    def packed(data: bytes, name: str) -> Path:
        (place / name).write_bytes(data)
        return place / name

    def unpacked(path: Path) -> None:
        allowed(lambda p: unpack(p, place / "out" / "s.zarr"), path)

    def folder(damage: Callable[[Path], None]) -> Path:
        shutil.copytree(whole, place / "s.zarr")
        damage(place / "s.zarr")
        return place / "s.zarr"

    def bare(path: Path) -> None:
        files = sorted(file for file in path.rglob("*") if file.is_file())
        file = rng.choice(files)
        file.write_bytes(flipped(file.read_bytes(), rng))

    while True:
        if kind == "zip":
            yield lambda _: use(packed(flipped(stored.read_bytes(), rng), "s.zarr.zip"))
            yield lambda _: (rezipped(stored, place / "s.zarr.zip", rng), use(place / "s.zarr.zip"))  # type: ignore[func-returns-value]
            yield lambda _: unpacked(packed(flipped(stored.read_bytes(), rng), "s.zip"))
        elif kind == "folder":
            yield lambda _: use(folder(bare))
            yield lambda _: use(folder(lambda path: forge(path, rng)))
        elif kind == "hdf5":
            yield lambda _: unpacked(packed(flipped(hdf5.read_bytes(), rng), "s.h5"))
        elif kind == "hdf5 source":
            yield lambda _: source(
                packed(flipped(pictures(root).read_bytes(), rng), "p.h5"),
                lambda path: Hdf5(path=path, ids="ids" if rng.random() < 0.3 else None),
            )
        elif kind == "hdf5 heap":
            heap = bytearray(heaps(root).read_bytes())
            heap = heap_damaged(heap, rng) if rng.random() < 0.5 else bytearray(flipped(bytes(heap), rng))
            yield lambda _: source(packed(bytes(heap), "p.h5"), lambda path: Hdf5(path=path))  # noqa: B023
        elif kind in ("parquet", "arrow"):
            data = flipped(table(kind), rng)
            yield lambda _: source(packed(data, f"p.{kind}"), lambda path: Parquet(path=str(path)))  # noqa: B023
        else:
            squeezed = rng.random() < 0.5
            data = flipped(tar(), rng)
            data = gzip.compress(data, 1) if squeezed else data
            data = flipped(data, rng) if squeezed and rng.random() < 0.5 else data
            yield lambda _: source(packed(data, "p.tar"), lambda path: WebDataset(path=str(path)))  # noqa: B023


def source(path: Path, make: Callable[[Path], Hdf5 | Parquet | WebDataset]) -> None:
    allowed(lambda p: (sum(1 for _ in make(p).records()), make(p).size()), path)


def pictures(root: Path) -> Path:
    """HDF5 as a source of pictures and captions of fixed lengths."""
    path = root / "pictures.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            file.create_dataset("images", data=np.arange(40 * 27, dtype=np.uint8).reshape(40, 3, 3, 3))
            file.create_dataset("captions", data=np.array([f"Bild {row}" for row in range(40)], "S"))
            file.create_dataset("ids", data=np.array([f"{row}.png" for row in range(40)], "S"), chunks=(8,))
    return path


def heaps(root: Path) -> Path:
    """The same of variable lengths, which lie in heaps: on damaged ones libhdf5 may never end."""
    path = root / "heaps.h5"
    if not path.exists():
        with h5py.File(path, "w") as file:
            images = file.create_dataset("images", 40, h5py.vlen_dtype(np.uint8))
            for row in range(40):
                images[row] = np.arange(50 + row, dtype=np.uint8)
            file["captions"] = [f"Bild {row} ü" for row in range(40)]
    return path


def heap_damaged(data: bytearray, rng: random.Random) -> bytearray:
    """Numbers of a heap exchanged for such as lead astray."""
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"GCOL"]
    at = rng.choice(starts) + 16 + 8 * rng.randrange(400)
    for _ in range(rng.choice([1, 1, 3])):
        number = rng.choice([0, 1, 16, 2**16, 2**31, 2**40, 2**63 - 1, 2**64 - 1, 2**64 - 8, 2**64 - 16])
        data[at : at + 8] = number.to_bytes(8, "little")
        at += 8
    return data


def table(kind: str) -> bytes:
    """Pictures and conversations in three row groups, or in compressed batches of a stream."""
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "ü"}]
    pictures = [{"bytes": bytes(range(50 + row)), "path": f"{row % 30}.png"} for row in range(40)]
    whole, out = pa.table({"image": pictures, "conversations": [turns] * 40}), io.BytesIO()
    if kind == "parquet":
        pq.write_table(whole, out, row_group_size=16)
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(out, whole.schema, options=options) as stream:
            stream.write_table(whole, max_chunksize=16)
    return out.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for row in range(6):
            for name, data in (
                (f"{row}.png", b"picture"),
                (f"{row}.txt", b"words"),
                ("é" * 120 + ".json", b"{}"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def main(kind: str, number: int, seed: int) -> None:
    apart.SECONDS = 5.0
    rng = random.Random(f"{kind} {seed}")
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        root = Path(folder)
        # Libraries are loaded before memory is measured.
        use(caches.write(root / "first" / "s.zarr", caches.features(6), failed=(2,)).path)
        start = peak()
        for count, case in enumerate(cases(kind, root, rng)):
            if count == number:
                break
            shutil.rmtree(root / "now", ignore_errors=True)
            (root / "now").mkdir()
            Found.where, Found.tried = f"{kind} {count}", Found.tried + 1
            case(root / "now")
    found = {"tried": Found.tried, "refused": Found.refused, "grown": peak() - start, "faults": Found.faults}
    print(json.dumps(found))


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
