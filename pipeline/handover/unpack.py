"""A cache out of a file that a stranger may have sent: verified as it is read, then renamed.

Nothing is taken from the file but what its manifest lists, and the manifest can only list what a cache
has. So no name leads elsewhere, no link is followed, nothing is executed and nothing grows without
bound. What a killed run wrote is in `<target>.incoming` and is used if its hash is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, Any

from fedcmp.pipeline.cache.files import StoredZip
from fedcmp.pipeline.cache.format import MANIFEST_LIMIT, parse_manifest
from fedcmp.pipeline.cache.mark import remember_written
from fedcmp.pipeline.cache.verify import require_whole
from fedcmp.pipeline.console import progress
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked, replace_directory, sync_directory, write_atomic
from fedcmp.pipeline.handover.archive import BLOCK, Archive, Unpacked
from fedcmp.pipeline.handover.receive import last_claim
from fedcmp.pipeline.handover.signature import (
    SIGNATURE,
    SIGNATURE_LIMIT,
    claim_of,
    require_newer,
    require_silo,
    require_trusted,
)
from fedcmp.pipeline.hashes import sha256_file

_HDF5 = b"\x89HDF\r\n\x1a\n"
_FRAME_HEADER = 18
_WINDOW = 1 << 27
# Features shrink by a third at most; what grows twentyfold is no features but an attack.
_GROWTH = 20


def unpack(
    packed: Path,
    target: Path,
    *,
    trust: Path | None = None,
    expect: str | None = None,
    overwrite: bool = False,
    allow_older: bool = False,
) -> Unpacked:
    """Verify a packed cache and give it its place.

    Args:
        packed: A file of `fedcmp cache pack`.
        target: Folder of the cache; what is signed must be signed as the silo that this names.
        trust: Public key that must have signed it.
        expect: SHA-256 that its manifest must have.
        overwrite: Replace what is at `target`.
        allow_older: Also by what was signed earlier.

    Raises:
        UserError: Anything about it is not as it should be; `target` is left as it was.
    """
    archive = _opened(packed)
    digest = hashlib.sha256(archive.manifest).hexdigest()
    if expect is not None and expect.replace(" ", "").lower() != digest:
        raise UserError(f"{packed}: its manifest's SHA-256 is {digest}, not {expect}; do not use it")
    silo = target.name.removesuffix(".zarr")
    claim = claim_of(archive.signature)
    if trust is not None:
        claim = require_trusted(archive.manifest, archive.signature, trust, silo, str(packed))
    elif claim is not None:
        require_silo(claim, silo, str(packed))
    manifest = parse_manifest(archive.manifest, f"{packed}: manifest.json")
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; pass --overwrite to replace it")
    if not allow_older:
        require_newer(claim, last_claim(target), str(packed))
    _require_room(packed, target, manifest)
    incoming = target.with_name(f"{target.name}.incoming")
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_name(f".{target.name}.lock"), str(target)):
        _start(incoming, set(manifest["files"]))
        try:
            with progress(f"unpack {target.stem}", len(manifest["files"]), "files") as task:
                for name, (size, wanted) in manifest["files"].items():
                    file = incoming / name
                    if not (file.is_file() and file.stat().st_size == size and sha256_file(file) == wanted):
                        file.parent.mkdir(parents=True, exist_ok=True)
                        archive.restore(name, file, size, wanted)
                    task.advance()
            if archive.signature is not None:
                write_atomic(incoming / SIGNATURE, archive.signature)
            write_atomic(incoming / "manifest.json", archive.manifest)
            require_whole(incoming, str(packed))
        except UserError:
            shutil.rmtree(incoming)
            raise
        sync_directory(incoming)
        replace_directory(incoming, target)
        remember_written(target, claim.plain() if claim else None)
    return Unpacked(target, manifest["images"], manifest["texts"], digest, archive.signature is not None)


def _opened(packed: Path) -> Archive:
    try:
        with packed.open("rb") as file:
            start = file.read(len(_HDF5))
    except OSError as error:
        raise UserError(f"{packed}: {error.strerror}; give a file of 'fedcmp cache pack'") from None
    if start == _HDF5:
        from fedcmp.pipeline.handover.hdf5 import open_archive

        return Archive(*open_archive(packed))
    if start[:2] != b"PK":
        raise UserError(f"{packed}: neither a zip nor HDF5; give a file of 'fedcmp cache pack'")
    return _opened_zip(packed)


def _opened_zip(packed: Path) -> Archive:
    archive = StoredZip(packed)
    if "manifest.json" not in archive.members:
        raise UserError(f"{packed}: there is no manifest.json in it, so it is no feature cache")
    data = archive.read("manifest.json", MANIFEST_LIMIT)
    manifest = parse_manifest(data, f"{packed}: manifest.json")
    files = manifest["files"]
    for name in archive.members:
        if name not in (SIGNATURE, "manifest.json") and name.removesuffix(".zst") not in files:
            raise UserError(f"{packed}: {name!r} is in it but not in its manifest; do not use it")
    for name, (size, _) in files.items():
        plain, compressed = archive.size(name), archive.size(f"{name}.zst")
        if (plain is None) == (compressed is None) or (plain is not None and plain != size):
            raise UserError(
                f"{packed}: '{name}' is missing, there twice or not {size} bytes long; do not use it"
            )
    signature = archive.read(SIGNATURE, SIGNATURE_LIMIT) if SIGNATURE in archive.members else None

    def restore(name: str, file: Path, size: int, digest: str) -> None:
        place = name if name in archive.members else f"{name}.zst"
        start, stored = archive.place(place)
        with packed.open("rb") as source, file.open("wb") as to:
            source.seek(start)
            limited = _Limited(source, stored)
            reader = limited if place == name else _Decompressed(limited, size, f"{packed}: '{place}'")
            found = _copy(reader, to, size)
            to.flush()
            os.fsync(to.fileno())
        if found != digest:
            raise UserError(
                f"{packed}: '{place}' (bytes {start} to {start + stored}) is not what its manifest "
                "says; have it sent again"
            )

    return Archive(data, signature, restore)


def _copy(source: Any, to: IO[bytes], size: int) -> str:
    """Copy `size` bytes at most; the SHA-256 of what was copied, or of nothing where there is more."""
    digest, copied = hashlib.sha256(), 0
    while block := source.read(min(BLOCK, size + 1 - copied)):
        copied += len(block)
        if copied > size:
            return "longer than it should be"
        digest.update(block)
        to.write(block)
    return digest.hexdigest()


class _Limited:
    """The next bytes of a file, no more."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


class _Decompressed:
    """Content of one zstd frame of a size that is known before, in bounded memory."""

    def __init__(self, source: _Limited, size: int, what: str) -> None:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{what} needs zstandard; pip install 'fedcmp[handover]'") from None
        self._what, self._error = what, zstandard.ZstdError
        start = source.read(_FRAME_HEADER)
        try:
            frame = zstandard.get_frame_parameters(start)
        except zstandard.ZstdError as error:
            raise UserError(f"{what} is not compressed by zstd ({error}); do not use it") from None
        if frame.content_size != size or frame.window_size > _WINDOW:
            raise UserError(
                f"{what} would become {frame.content_size} bytes, not {size} as its manifest says; do not "
                "use it"
            )
        decompressor: Any = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        self._reader = decompressor.stream_reader(_Joined(start, source))

    def read(self, size: int) -> bytes:
        try:
            return bytes(self._reader.read(size))
        except self._error as error:
            raise UserError(f"{self._what} cannot be decompressed ({error}); have it sent again") from None


class _Joined:
    """What was read already, then the rest."""

    def __init__(self, start: bytes, rest: _Limited) -> None:
        self._start, self._rest = start, rest

    def read(self, size: int = -1) -> bytes:
        data, self._start = self._start, b""
        return data or self._rest.read(size)


def _require_room(packed: Path, target: Path, manifest: dict[str, Any]) -> None:
    size = sum(size for size, _ in manifest["files"].values())
    have = packed.stat().st_size
    if size > _GROWTH * have + BLOCK:
        raise UserError(f"{packed}: {have} bytes would become {size}; no features do that, do not use it")
    folder = target.parent
    while not folder.exists():
        folder = folder.parent
    if size > shutil.disk_usage(folder).free:
        raise UserError(f"{target}: {size} bytes do not fit on this disk; free some space and rerun to go on")


def _start(incoming: Path, wanted: set[str]) -> None:
    """Keep of a killed run only what may still be used."""
    if incoming.is_symlink():
        incoming.unlink()
    incoming.mkdir(exist_ok=True)
    for file in list(incoming.rglob("*")):
        if file.is_symlink() or (not file.is_dir() and str(file.relative_to(incoming)) not in wanted):
            file.unlink()
