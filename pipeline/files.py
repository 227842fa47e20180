"""Files that are whole or absent, and locks."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fedcmp.pipeline.errors import BusyError, UserError


@contextmanager
def locked(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file while at work on something.

    Args:
        path: The lock file.
        what: What is worked on, for the error.
        wait: Wait for another process instead of refusing.

    Raises:
        BusyError: Another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(f"{what}: another process is at work on it; let it finish") from None
        yield


def is_locked(path: Path) -> bool:
    """Whether another process, or another part of this one, holds a lock file."""
    try:
        with locked(path, str(path)):
            return False
    except BusyError:
        return True


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either whole or absent, also after a crash."""
    with atomic(path) as file:
        file.write(data)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that gets its name, and its place on the disk, when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: containers on one shared file system all start at 1.
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_directory(new: Path, path: Path) -> None:
    """Give a finished directory its final name, in place of what may be there."""
    old = path.with_name(path.name + ".old")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    sync_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write readable JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Read JSON, or None where there is no such file.

    Raises:
        UserError: The file is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run again") from None
