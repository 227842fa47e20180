"""Whose turn it is to write a cache, where it is built, and the rename that ends it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from fedcmp.pipeline.files import locked, read_json, replace_directory


def partial_path(path: Path) -> Path:
    """Where the cache of a silo is built before it is whole."""
    return path.with_name(path.name + ".partial")


def started_key(path: Path) -> dict[str, Any] | None:
    """The key of a silo's finished or unfinished cache, None where there is neither."""
    for place in (path / "manifest.json", partial_path(path) / "_done" / "identity.json"):
        content = read_json(place)
        if content is not None and "key" in content:
            return dict(content["key"])
    return None


def finish_commit(path: Path) -> None:
    """Give a whole partial cache its final name; also completes a commit that was interrupted."""
    partial = partial_path(path)
    if not (partial / "manifest.json").is_file():
        return
    shutil.rmtree(partial / "_done", ignore_errors=True)
    replace_directory(partial, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Keep other processes from writing the same cache.

    Raises:
        UserError: Another process is at it.
    """
    with ExitStack() as held:
        with settling(path):
            held.enter_context(locked(lock_path(path), str(path)))
        yield


def settling(path: Path) -> AbstractContextManager[None]:
    """Wait for one's turn to start on a cache or to commit it; held for moments only, never nested."""
    return locked(path.with_name(f".{path.name}.commit.lock"), str(path), wait=True)


def lock_path(path: Path) -> Path:
    """What whoever writes a cache holds."""
    return path.with_name(f".{path.name}.lock")


def try_lock(file: IO[Any], kind: int) -> bool:
    """Lock an open file if nobody else has; False where somebody has."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
