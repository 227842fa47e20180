"""What goes into one file, and what comes out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcmp.pipeline.cache import CorruptCacheError

BLOCK = 1 << 20


@dataclass(frozen=True)
class Packed:
    """What was written.

    Attributes:
        manifest: The SHA-256 to read out on the phone.
        signed: With the key that was given, or the one that the cache came with.
        left_out: Why the signature that the cache came with is not in it, None where it is or there was none.
    """

    path: Path
    size: int
    manifest: str
    signed: bool
    left_out: str | None
    texts: int


@dataclass(frozen=True)
class Content:
    """What goes into a pack: the manifest's bytes, and where each of its files lies.

    Attributes:
        files: By name, path, size and SHA-256.
    """

    manifest: bytes
    signature: bytes | None
    files: dict[str, tuple[Path, int, str]]


def copy_hashed(path: Path, to: Any, size: int, digest: str) -> None:
    """Copy a file of the cache block by block.

    Raises:
        CorruptCacheError: It is not what the manifest says.
    """
    found, copied = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
            to.write(block)
            copied += len(block)
    if copied != size or found.hexdigest() != digest:
        raise CorruptCacheError(
            f"{path}: bytes 0 to {copied} are not what the manifest says; see 'fedcmp cache verify'"
        )


@dataclass(frozen=True)
class Unpacked:
    """What was received; `manifest` is the SHA-256 that the sender can read out."""

    path: Path
    images: int
    texts: int
    manifest: str
    signed: bool


@dataclass(frozen=True)
class Archive:
    """A packed cache.

    Attributes:
        manifest: Bytes of its manifest.
        signature: Of these bytes, None where there is none.
        restore: Write one of its files to a path; raises a UserError where it is not what it should be.
    """

    manifest: bytes
    signature: bytes | None
    restore: Callable[[str, Path, int, str], None]
