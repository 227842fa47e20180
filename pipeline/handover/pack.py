"""One file out of a cache: a zip that compresses nothing, or HDF5, hashed again while it is written."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.cache.derive import with_texts
from fedcmp.pipeline.cache.files import Folder
from fedcmp.pipeline.cache.format import render_manifest
from fedcmp.pipeline.cache.locks import try_lock
from fedcmp.pipeline.console import Task, progress
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import sync_directory
from fedcmp.pipeline.handover.archive import Content, Packed, copy_hashed
from fedcmp.pipeline.handover.signature import SIGNATURE, SIGNATURE_LIMIT, misfit, sign

_TIME = (1980, 1, 1, 0, 0, 0)


def pack(
    path: Path,
    out: Path,
    *,
    hdf5: bool = False,
    zstd: bool = False,
    texts: bool = True,
    key: Path | None = None,
    silo: str | None = None,
    overwrite: bool = False,
) -> Packed:
    """Pack a cache; equal caches and options give equal bytes, but for a new signature, which has a time.

    The signature that a cache came with goes with it, where it fits what is packed.

    Args:
        path: The cache's folder.
        out: The file to write.
        hdf5: Write HDF5 instead of a zip.
        zstd: Compress every file in the zip; it must be unpacked to be read.
        texts: Put the texts in, too.
        key: Sign the manifest with this private key, whoever signed it before.
        silo: As this silo's; by default the folder's name.
        overwrite: Replace what is at `out`.

    Raises:
        UserError: The cache is damaged, `out` exists, or options exclude each other.
    """
    if silo and key is None:
        raise UserError(f"--silo {silo}: goes with --sign, which says whose a cache is")
    if hdf5 and zstd:
        raise UserError("--hdf5 with --zstd: only a zip is compressed; leave one out")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; pass --overwrite to replace it")
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a cache's folder")
    cache = FeatureCache(path)
    if "sha256" not in cache.manifest:
        raise UserError(f"{path}: its manifest is of an earlier version; extract the silo with --overwrite")
    with tempfile.TemporaryDirectory(prefix="fedcmp-") as folder:
        manifest = cache.manifest
        changed: set[str] = set()
        if not texts:
            manifest = with_texts(cache, Path(folder), [()] * cache.images, {"texts_left_out": True})
            changed = {name for name in manifest["files"] if name.startswith("texts/")}
        data = (path / "manifest.json").read_bytes() if texts else render_manifest(manifest)
        signature, left_out = _came_with(path, data)
        if left_out is not None and not texts:
            left_out = "its signature is of it with its texts"
        if key is not None:
            signature = sign(data, key, silo or path.resolve().name.removesuffix(".zarr"))
            left_out = None
        files = {
            name: (Path(folder) / name if name in changed else path / name, size, digest)
            for name, (size, digest) in manifest["files"].items()
        }
        content = Content(data, signature, files)
        out.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(out) as temporary, progress(f"pack {path.stem}", len(files), "files") as task:
            if hdf5:
                from fedcmp.pipeline.handover.hdf5 import export

                export(temporary, cache, content, task)
            else:
                _write_zip(temporary, content, task, zstd=zstd)
    return Packed(
        out,
        out.stat().st_size,
        hashlib.sha256(data).hexdigest(),
        signature is not None,
        left_out,
        manifest["texts"],
    )


def _came_with(path: Path, manifest: bytes) -> tuple[bytes | None, str | None]:
    """The signature that lies in a cache's folder, or why it cannot go with it."""
    files = Folder(path)
    if files.size(SIGNATURE) is None:
        return None, None
    signature = files.read(SIGNATURE, SIGNATURE_LIMIT)
    left_out = misfit(manifest, signature)
    return (signature if left_out is None else None), left_out


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A file beside `out` that takes its place when it is whole; a killed one is written anew."""
    temporary = out.with_name(f".tmp-{out.name}")
    with temporary.open("ab") as lock:
        if not try_lock(lock, fcntl.LOCK_EX):
            raise UserError(f"{out}: another process is at work on it; let it finish")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    sync_directory(out.parent)


def _write_zip(out: Path, content: Content, task: Task, *, zstd: bool) -> None:
    with out.open("r+b") as file:
        file.truncate()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_entry("manifest.json"), content.manifest)
            if content.signature is not None:
                archive.writestr(_entry(SIGNATURE), content.signature)
            for name, (path, size, digest) in content.files.items():
                with archive.open(
                    _entry(name + (".zst" if zstd else "")), "w", force_zip64=size > 1 << 30
                ) as to:
                    if zstd:
                        with compressor(to, size) as compressed:
                            copy_hashed(path, compressed, size, digest)
                    else:
                        copy_hashed(path, to, size, digest)
                task.advance()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.external_attr = 0o100644 << 16
    entry.create_system = 3
    return entry


def compressor(to: IO[bytes], size: int) -> Any:
    """A stream into one zstd frame that says how long its content is."""
    try:
        import zstandard
    except ImportError:
        raise UserError("--zstd needs zstandard; pip install 'fedcmp[handover]'") from None
    return zstandard.ZstdCompressor(level=1).stream_writer(to, size=size, closefd=False)
