"""Hostile files: each is refused in one line, in bounded memory, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import caches
import h5py
import numpy as np
import pytest
import zstandard
from conftest import ROOT, digest, picture

from fedcmp.pipeline.cache import CorruptCacheError, FeatureCache
from fedcmp.pipeline.cache.format import crc, crc_bytes, render_manifest, seal_manifest
from fedcmp.pipeline.cache.stream import stream_shard
from fedcmp.pipeline.cache.verify import verify
from fedcmp.pipeline.cache.writer import file_table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.pack import pack
from fedcmp.pipeline.handover.unpack import unpack
from fedcmp.pipeline.records import Record

SHARD = "features/patch/c/0/0/0"
MEMORY = 160 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return caches.write(tmp_path / "inside" / "s.zarr", caches.features(6)).path


def forge(path: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Do what a competent forger does: make hashes, sizes and seal fit whatever was changed."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["files"] = file_table(path, {})
    change(manifest)
    (path / "manifest.json").write_bytes(render_manifest(seal_manifest(manifest)))


def zipped(path: Path, out: Path, more: dict[str, bytes] | None = None) -> Path:
    """A stored zip of a folder, and whatever else."""
    with zipfile.ZipFile(out, "w") as archive:
        for file in sorted(path.rglob("*")):
            if file.is_file() and not file.is_symlink():
                archive.write(file, str(file.relative_to(path)))
        for name, data in (more or {}).items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return out


def refused(packed: Path, words: str) -> None:
    """Unpacking fails in one line with these words, and nothing is written anywhere."""
    root = packed.parent
    (root / "inside").mkdir(exist_ok=True)
    before = digest(root), sorted(map(str, root.rglob("*")))
    with pytest.raises(UserError, match=words) as caught:
        unpack(packed, root / "inside" / "new" / "r.zarr")
    assert "\n" not in str(caught.value)
    (root / "inside/new/.r.zarr.lock").unlink(missing_ok=True)
    if (root / "inside/new").exists():
        (root / "inside/new").rmdir()
    assert (digest(root), sorted(map(str, root.rglob("*")))) == before


@pytest.mark.parametrize(
    "name",
    ["../evil", "../../evil", "/tmp/fedcmp-evil", "features/../../evil", "a\\..\\evil", "C:evil", "evil"],
)
@pytest.mark.parametrize("listed", [False, True])
def test_paths_that_lead_elsewhere(tmp_path: Path, path: Path, name: str, listed: bool) -> None:
    if listed:
        digest_ = "c7c5c1d70c5dec4416ab6158afd0b223ef40c29b1dc1f97ed9428b94d4cadb1c"
        forge(path, lambda manifest: manifest["files"].update({name: [4, digest_]}))
    refused(
        zipped(path, tmp_path / "p.zip", {name: b"evil"}),
        "which no cache has" if listed else "not in its manifest",
    )
    assert not Path("/tmp/fedcmp-evil").exists()


def test_a_tar_is_no_cache(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "p.zip", "w") as tar:
        info = tarfile.TarInfo("../evil")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    refused(tmp_path / "p.zip", "neither a zip nor HDF5")


def test_a_link_in_a_zip(tmp_path: Path, path: Path) -> None:
    (path / SHARD).unlink()
    link = zipfile.ZipInfo(SHARD)
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(zipped(path, tmp_path / "p.zip"), "a") as archive:
        archive.writestr(link, "/etc/passwd")
    refused(tmp_path / "p.zip", "is a link")


@pytest.mark.parametrize("what", ["chunk", "folder", "text", "pipe"])
def test_links_in_a_folder_are_not_followed(tmp_path: Path, path: Path, what: str) -> None:
    target = {"chunk": SHARD, "folder": "features/patch/c/0", "text": "texts/bytes/c/0", "pipe": SHARD}[what]
    (path / target).rename(tmp_path / "elsewhere")
    if what == "pipe":
        os.mkfifo(path / target)
    else:
        (path / target).symlink_to(tmp_path / "elsewhere")
    assert any("link" in str(problem) for problem in verify(path))
    with pytest.raises(CorruptCacheError, match="missing or not"):
        FeatureCache(path)
    with pytest.raises(CorruptCacheError, match="missing or not"):
        pack(path, tmp_path / "p.zip")


def bombs(path: Path, root: Path) -> dict[str, tuple[Path, str]]:
    """Small files that would become large, with what is said about each."""
    gib = 1 << 30
    frame = io.BytesIO()
    with zstandard.ZstdCompressor(level=1).stream_writer(frame, size=gib, closefd=False) as writer:
        for _ in range(64):
            writer.write(bytes(gib >> 6))
    bomb = frame.getvalue()
    assert len(bomb) < 200_000
    unsaid = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))
    whole = (path / SHARD).read_bytes()
    honest = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(bytes(len(whole)))
    lying = bytearray(bomb)
    assert zstandard.get_frame_parameters(bomb).content_size == gib
    # A frame that says the right size and holds more.
    at = bomb.index(struct.pack("<I", gib))
    lying[at : at + 4] = struct.pack("<I", len(whole))
    assert zstandard.get_frame_parameters(bytes(lying)).content_size == len(whole)
    (path / SHARD).unlink()
    found = {
        "zstd": (zipped(path, root / "zstd.zip", {f"{SHARD}.zst": bomb}), "would become 1073741824 bytes"),
        "unsaid": (zipped(path, root / "unsaid.zip", {f"{SHARD}.zst": unsaid}), "would become"),
        "lying": (
            zipped(path, root / "lying.zip", {f"{SHARD}.zst": bytes(lying)}),
            "cannot be decompressed",
        ),
        "zeros": (zipped(path, root / "zeros.zip", {f"{SHARD}.zst": honest}), "its manifest says"),
    }
    (path / SHARD).write_bytes(whole)
    with zipfile.ZipFile(root / "deflate.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path / "manifest.json", "manifest.json", zipfile.ZIP_STORED)
        with archive.open(SHARD, "w") as member:
            for _ in range(64):
                member.write(bytes(1 << 20))
    found["deflate"] = root / "deflate.zip", "compressed or encrypted"
    forge(path, lambda manifest: manifest["files"].update({SHARD: [gib, "0" * 64]}))
    found["fitting"] = zipped(path, root / "fitting.zip", {f"{SHARD}.zst": bomb}), "there twice"
    (path / SHARD).unlink()
    found["consistent"] = zipped(path, root / "consistent.zip", {f"{SHARD}.zst": bomb}), "no features do that"
    entries = b"".join(
        b"PK\1\2"
        + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 33, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
        + b"%08d" % n
        for n in range(350_000)
    )
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, len(entries), 0, 0)
    (root / "directory.zip").write_bytes(entries + end)
    found["directory"] = root / "directory.zip", "directory is larger"
    many = {f"texts/bytes/c/{n}": [1, "0" * 64] for n in range(100_000)}
    forge(path, lambda manifest: manifest["files"].update(many))
    found["many"] = zipped(path, root / "many.zip"), "shards|files|there twice|missing"
    for name, text in (("deep", b"[" * 5_000_000), ("digits", b'{"images": 1' + b"0" * 5_000_000 + b"}")):
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            archive.writestr("manifest.json", text)
        found[name] = root / f"{name}.zip", "not a manifest"
    return found


PROBE = """
import sys
from pathlib import Path
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.handover.unpack import unpack
try:
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
except UserError as error:
    print(error)
print(1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]))
"""


def test_bombs_take_little_memory(tmp_path: Path, path: Path) -> None:
    for name, (bomb, words) in bombs(path, tmp_path).items():
        target = tmp_path / "out" / f"{name}.zarr"
        result = subprocess.run(
            [sys.executable, "-c", PROBE, bomb, target], capture_output=True, text=True, cwd=ROOT, check=False
        )
        message, peak = result.stdout.strip().splitlines()
        assert any(word in message for word in words.split("|")), (name, message)
        assert int(peak) < MEMORY, name
        left = [file for file in (tmp_path / "out").rglob("*") if ".lock" not in file.name]
        assert left == [], name


def test_the_same_name_twice(tmp_path: Path, path: Path) -> None:
    packed = pack(path, tmp_path / "p.zip").path
    with zipfile.ZipFile(packed, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("manifest.json", b"{}")
    refused(packed, "is in it twice")


@pytest.mark.parametrize("cut", [1, 22, 30, 5000])
def test_a_zip_that_was_cut_off(tmp_path: Path, path: Path, cut: int) -> None:
    packed = pack(path, tmp_path / "p.zip").path
    packed.write_bytes(packed.read_bytes()[:-cut])
    refused(packed, "was it sent as a whole")


@pytest.mark.parametrize("what", ["external", "link", "soft", "virtual", "gzip", "absent", "object", "wide"])
def test_hdf5_that_reads_elsewhere(tmp_path: Path, path: Path, what: str) -> None:
    packed = pack(path, tmp_path / "p.h5", hdf5=True).path
    (tmp_path / "secret").write_bytes(bytes(range(256)) * 2)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = np.zeros((6, 4, 6), np.uint16)
    with h5py.File(packed, "a") as file:
        kept = file["features/patch"][:]
        del file["features/patch"]
        if what == "external":
            external = [(str(tmp_path / "secret"), 0, kept.nbytes)]
            file.create_dataset("features/patch", kept.shape, kept.dtype, external=external)
        elif what == "link":
            file["features/patch"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")
        elif what == "soft":
            file["hidden"] = kept
            file["features/patch"] = h5py.SoftLink("/hidden")
        elif what == "virtual":
            layout = h5py.VirtualLayout(kept.shape, kept.dtype)
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", kept.shape)
            file.create_virtual_dataset("features/patch", layout)
        elif what == "gzip":
            file.create_dataset("features/patch", data=np.zeros_like(kept), compression="gzip")
        elif what == "absent":
            file.create_dataset("features/patch", (1 << 40, 4, 6), kept.dtype)
        elif what == "object":
            file.create_dataset("features/patch", (6, 4, 6), h5py.string_dtype())
        else:
            file.create_dataset("features/patch", data=kept.astype(np.float64))
    words = {
        "external": "from other files",
        "link": "is a link",
        "soft": "is a link",
        "virtual": "from other files",
        "wide": "float64",
    }
    refused(packed, words.get(what, "not contiguous and whole"))


def test_a_link_instead_of_the_manifest_in_hdf5(tmp_path: Path, path: Path) -> None:
    packed = pack(path, tmp_path / "p.h5", hdf5=True).path
    with h5py.File(packed, "a") as file:
        del file["manifest"]
        file["manifest"] = h5py.ExternalLink("/etc/passwd", "x")
    refused(packed, "'manifest' in 'manifest' is a link")


class Evil:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.trace}",)


def test_pickles_in_webdataset_are_not_read(tmp_path: Path) -> None:
    from fedcmp.extract.sources.webdataset import WebDataset

    trace = tmp_path / "trace"
    evil = pickle.dumps(Evil(trace))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        members = {
            "../../a.png": picture(0),
            "../../a.txt": b"words",
            "../../a.pyd": evil,
            "../../a.pickle": evil,
        }
        members |= {"../../a.npy": b"\x93NUMPY" + evil, "../../a.pth": evil}
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    before = sorted(map(str, tmp_path.parent.rglob("*")))
    records = list(WebDataset(path=str(tmp_path / "0.tar")).records())
    assert [getattr(record, "image", None) for record in records if isinstance(record, Record)] == [
        picture(0)
    ]
    assert not trace.exists()
    assert sorted(map(str, tmp_path.parent.rglob("*"))) == before


@pytest.mark.parametrize("url", ["pipe:touch {trace}", "pipe:touch {trace}|", "file:pipe:touch {trace}"])
def test_pipes_are_not_run(tmp_path: Path, url: str) -> None:
    from fedcmp.extract.sources.webdataset import WebDataset

    with pytest.raises(UserError, match="no such shard"):
        list(WebDataset(path=url.format(trace=tmp_path / "trace")).records())
    assert not (tmp_path / "trace").exists()


def test_a_file_that_shrinks_after_it_was_opened(path: Path) -> None:
    cache = FeatureCache(path)
    with (path / SHARD).open("r+b") as file:
        file.truncate(10)
    with pytest.raises(CorruptCacheError, match="shorter than its manifest says"):
        cache.read([0])


@pytest.mark.parametrize("dtype", ["uint16", "float16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(tmp_path: Path, dtype: str, value: float) -> None:
    stored = caches.features(6)
    bad = (np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype != "uint16":
        stored, bad = stored.astype(dtype), np.array([value], dtype)
    stored[5, 3, 2] = bad[0]
    cache = caches.write(tmp_path / "s.zarr", stored)
    (problem,) = verify(cache.path)
    assert "image 5 holds numbers that are infinite" in str(problem)
    assert (problem.start, problem.file) == (stored[0].nbytes + 4, "features/patch/c/1/0/0")
    refused(pack(cache.path, tmp_path / "p.zip").path, "infinite or not a number")


def rewrite(path: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    metadata = json.loads((path / name).read_bytes())
    change(metadata)
    (path / name).write_text(json.dumps(metadata))


def chunk(path: Path, name: str, data: bytes) -> None:
    (path / name).write_bytes(data + crc_bytes(crc(np.frombuffer(data, np.uint8))))


CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "more images": ({"images": 7}, "where the manifest says"),
    "many images": ({"images": 10**15}, "files, but it lists 2"),
    "fewer images": ({"images": 5}, "where the manifest says"),
    "less than none": ({"images": -1}, "is no count"),
    "a fraction": ({"images": 6.5}, "is no count"),
    "true": ({"patches": True}, "is no count"),
    "many texts": ({"texts": 10**15}, "do not fit into files"),
    "fewer texts": ({"texts": 1}, r"shape \[7\] instead of \[2\]"),
    "wide": ({"d_vision": 10**12}, "too small for images"),
    "narrow": ({"d_vision": 5}, "where the manifest says"),
    "turned": ({"d_vision": 4, "patches": 6}, "where the manifest says"),
    "dtype": ({"dtype": "float16", "storage_dtype": "float16"}, "uint16 instead of float16"),
    "mixed dtype": ({"dtype": "float32"}, "is not stored as"),
    "objects": ({"dtype": "object", "storage_dtype": "object"}, "is not stored as"),
    "int8": ({"dtype": "int8", "storage_dtype": "int8"}, "quant"),
    "shards": ({"shard_images": 3}, "where the manifest says"),
    "huge shards": ({"shard_images": 10**9}, "more than"),
    "key": ({"key": {"encoder": "other"}}, "not the SHA-256 of key"),
    "format": ({"format": {"name": "fedcmp-features", "version": 2}}, "format"),
    "no source": ({"source": None}, "no source"),
    "failures": (
        {"failures": [{"id": "é1.png", "status": "missing", "reason": ""}]},
        "failures are not those",
    ),
    "no table": ({"files": []}, "no table of files"),
    "nonsense in the table": ({"files": {SHARD: ["1", None]}}, "size and SHA-256"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_manifests_that_lie(tmp_path: Path, path: Path, claim: str) -> None:
    fields, words = CLAIMS[claim]
    forge(path, lambda manifest: manifest.update(fields))
    if claim != "format":
        assert_found(path)
    refused(zipped(path, tmp_path / "p.zip"), words)


def status(path: Path, codes: list[int]) -> None:
    (path / "images/status/c").mkdir()
    chunk(path, "images/status/c/0", bytes(codes))


def metadata(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: rewrite(path, f"{name}/zarr.json".removeprefix("/"), change)


ZSTD = {"name": "zstd", "configuration": {}}
FORGERIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no shard": (lambda p: (p / SHARD).unlink(), "files, but it lists 1"),
    "no status": (lambda p: (p / "images/status/zarr.json").unlink(), "missing"),
    "unknown status": (lambda p: status(p, [9] * 6), "only 4 states"),
    "hidden failure": (lambda p: status(p, [1, 0, 0, 0, 0, 0]), "failures are not those"),
    "zstd codec": (metadata("texts/bytes", lambda z: z["codecs"].append(ZSTD)), "codecs bytes, crc32c, zstd"),
    "sharded zstd": (
        metadata("features/patch", lambda z: z["codecs"][0]["configuration"]["codecs"].insert(1, ZSTD)),
        "codecs bytes, zstd, crc32c",
    ),
    "no checksum": (metadata("texts/bytes", lambda z: z["codecs"].pop()), "instead of bytes, crc32c"),
    "filled": (metadata("images/status", lambda z: z.update(fill_value=1)), "not laid out"),
    "terabytes": (metadata("texts/bytes", lambda z: z.update(shape=[10**13])), "shape"),
    "chunks of terabytes": (
        metadata("texts/bytes", lambda z: z["chunk_grid"]["configuration"].update(chunk_shape=[10**13])),
        "bytes long",
    ),
    "elsewhere": (metadata("texts/bytes", lambda z: z.update(storage_transformers=[1])), "not laid out"),
    "no array": (lambda p: (p / "texts/bytes/zarr.json").write_text("[]"), "not a zarr array"),
    "consolidated": (metadata("", lambda z: z.update(consolidated_metadata={"a": 1})), "not a group"),
    "texts beyond": (
        lambda p: chunk(p, "texts/image_index/c/0", np.full(6, 99, "<i8").tobytes()),
        "names images beyond",
    ),
    "offsets": (
        lambda p: chunk(p, "texts/offsets/c/0", np.array([0, 9, 3, 3, 3, 3, 10**12], "<i8").tobytes()),
        "does not ascend",
    ),
    "kind": (lambda p: chunk(p, "texts/kind/c/0", bytes([7] * 6)), "does not exist"),
    "no conversation": (lambda p: chunk(p, "texts/kind/c/0", bytes([1] * 6)), "is no conversation"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_files_that_lie(tmp_path: Path, path: Path, forgery: str) -> None:
    change, words = FORGERIES[forgery]
    change(path)
    forge(path)
    assert_found(path)
    refused(zipped(path, tmp_path / "p.zip"), words)


def test_failed_images_have_no_features(tmp_path: Path, path: Path) -> None:
    status(path, [1, 0, 0, 0, 0, 0])
    failure = {"id": "é0.png", "status": "missing", "reason": ""}
    forge(path, lambda manifest: manifest.update(failures=[failure]))
    refused(zipped(path, tmp_path / "p.zip"), "failed but its row is not zero")


def assert_found(path: Path) -> None:
    problems = verify(path)
    assert problems
    assert all("\n" not in str(problem) for problem in problems)


def test_an_index_that_points_elsewhere(tmp_path: Path, path: Path) -> None:
    shard = path / SHARD
    data = bytearray(shard.read_bytes())
    index = np.frombuffer(data[-68:-4], "<u8").reshape(-1, 2).copy()
    size = int(index[0, 1])
    for change in ((0, 0, 2**63), (0, 1, 2**63), (1, 0, 0), (0, 0, len(data) - size + 8)):
        forged = index.copy()
        forged[change[0], change[1]] = change[2]
        data[-68:-4] = forged.tobytes()
        data[-4:] = crc_bytes(crc(bytes(data[-68:-4])))
        shard.write_bytes(data)
        forge(path)
        assert "its index puts image" in str(verify(path)[0])
        refused(zipped(path, tmp_path / "p.zip"), "its index puts image")


def test_a_deep_text(tmp_path: Path) -> None:
    from fedcmp.pipeline.cache import CacheWriter, Row

    texts = (("conversation", "train", "[" * 100_000),)
    path = tmp_path / "s.zarr"
    writer = CacheWriter(path, caches.identity(), patches=4, d_vision=6, dtype="bfloat16", shard_images=4)
    writer.write(0, caches.features(1), [Row("a", "0" * 64, 0, "", texts)])
    writer.commit({"silo": "s", "skipped": []})
    assert "text 0 is no conversation" in str(verify(path)[0])


def test_files_that_nobody_announced(tmp_path: Path, path: Path) -> None:
    (path / "sitecustomize.py").write_text("import os")
    assert [str(problem) for problem in verify(path)] == ["sitecustomize.py: not in the manifest"]
    refused(zipped(path, tmp_path / "p.zip"), "in it but not in its manifest")


def test_a_shard_of_another_program_is_still_checked(tmp_path: Path, path: Path) -> None:
    """Order within a shard is free; what is in it is not."""
    stored = FeatureCache(path).read(range(4))
    stream_shard(path / SHARD, stored[::-1].copy(), 4)
    forge(path)
    assert verify(path) == []
    np.testing.assert_array_equal(FeatureCache(path).read([0]), stored[3:])
