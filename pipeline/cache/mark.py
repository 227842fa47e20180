"""That a cache was verified wholly is remembered beside it, so that it is hashed once, not at every use."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcmp.pipeline.hashes import canonical, fingerprint, sha256_file

_LIMIT = 1 << 16


@dataclass(frozen=True)
class Mark:
    """What was verified.

    Attributes:
        manifest: SHA-256 of `manifest.json`.
        stamps: Of the files as they were then; see `stamps`.
        signed: Silo and time of the newest signature that was accepted here, None where there was none.
    """

    manifest: str
    stamps: str
    signed: dict[str, str] | None = None


def stamps(path: Path) -> str:
    """SHA-256 over name, size, times and inode of a cache's files, or of the zip that it is in.

    The time of the last change of an inode cannot be set, so a mark that came with the cache fits nothing.
    """
    found = [("", path.stat())] if path.is_file() else sorted(_files(path, ""))
    return fingerprint(
        [
            [name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, stat.S_IFMT(s.st_mode)]
            for name, s in found
        ]
    )


def _files(folder: Path, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                yield from _files(folder / entry.name, f"{prefix}{entry.name}/")
            else:
                # Names need not be UTF-8.
                yield os.fsencode(prefix + entry.name).hex(), status


def remember(path: Path, mark: Mark) -> None:
    """Write a mark beside a cache.

    Raises:
        OSError: The folder cannot be written to.
    """
    # Of one name, so that a killed process leaves at most one; what another process renamed is as good.
    temporary = _place(path).with_name(f"{_place(path).name}.tmp")
    temporary.write_bytes(canonical(asdict(mark)))
    with suppress(FileNotFoundError):
        temporary.replace(_place(path))


def remember_written(path: Path, signed: dict[str, str] | None = None) -> None:
    """Write the mark of a folder every byte of which was hashed while this process wrote it."""
    remember(path, Mark(sha256_file(path / "manifest.json"), stamps(path), signed))


def remembered(path: Path) -> Mark | None:
    """The mark beside a cache, None where there is none or anything else in its place."""
    try:
        with _place(path).open("rb") as file:
            found = json.loads(file.read(_LIMIT))
        manifest, held, signed = (found[name] for name in ("manifest", "stamps", "signed"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return Mark(str(manifest), str(held), _strings(signed))


def _strings(value: Any) -> dict[str, str] | None:
    return {str(key): str(each) for key, each in value.items()} if isinstance(value, dict) else None


def _place(path: Path) -> Path:
    """One for a silo, whether it lies there as a folder or as a zip."""
    return path.with_name(f".{path.name.removesuffix('.zip')}.verified.json")
