"""Files that a source is spread over: which they are, equal names in several, and damage to one."""

from __future__ import annotations

import glob
import gzip
from pathlib import Path

from fedcmp.extract.shortage import shortage
from fedcmp.extract.sources import Skipped
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.remote import Remote, is_url


def shards_of(path: str) -> list[Path | Remote]:
    """Files of a path or URL: one, a glob (`train-*.tar`) or a brace pattern (`train-{000..015}.tar`).

    Raises:
        UserError: One of them is not there.
    """
    from braceexpand import braceexpand

    shards = [shard for pattern in braceexpand(path) for shard in _matches(pattern)]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard}: no such shard; 'path' is {path!r}")
    return shards


def damage(shard: Path | Remote, error: Exception) -> Skipped:
    """What is reported of a damaged shard.

    Raises:
        UserError: It cannot be read now, but perhaps later: what that hides would be skipped for good.
        MemoryError: So does whatever else `shortage` knows.
    """
    if isinstance(error, UserError) or shortage(error):
        raise error
    if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
        raise UserError(f"{shard}: cannot be read ({error}); fix that and rerun to go on") from None
    return Skipped(str(shard), f"damaged shard: {one_line(error)}")


class Names:
    """Names of a silo's pictures: keys that start again in every shard are distinguished by its path."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._here: set[str] = set()
        self._shard = ""

    def take(self, shard: str, name: str) -> str | None:
        """The name of a picture of a shard, None where the same shard has it already."""
        if shard != self._shard:
            self._shard, self._here = shard, set()
        if name in self._here:
            return None
        self._here.add(name)
        *folders, file = shard.split("/")
        above = [*folders, Path(file).stem]
        free = (
            candidate
            for depth in range(len(above) + 1)
            if (candidate := "/".join([*above[len(above) - depth :], name])) not in self._taken
        )
        taken = next(free, None)
        if taken is not None:
            self._taken.add(taken)
        return taken


def _matches(pattern: str) -> list[Path | Remote]:
    if is_url(pattern):
        remote = Remote(pattern)
        matches = remote.glob() if glob.has_magic(pattern) else []
        return [*(matches or [remote])]
    return [Path(match) for match in sorted(glob.glob(pattern)) or [pattern]]
