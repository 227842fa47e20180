"""Local updates by content, so that equal training is never done twice."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fedcmp.federate.messages import Job, LocalResult
from fedcmp.pipeline.files import locked, write_atomic
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.models.projector import content_hash


def job_key(job: Job) -> dict[str, Any]:
    """What decides a client's local update besides its data, as JSON."""
    linear = job.objective.linear
    return {
        "start": content_hash(job.start),
        "pass": [job.round, job.rounds],
        "proximal": job.objective.proximal,
        "linear": None if linear is None else content_hash(linear),
        "gradient": "gradient" in job.wants,
        "update": job.update,
    }


class Memo:
    """A folder of local updates; when it is full, the least recently used ones are deleted.

    Args:
        folder: Where it lies.
        limit: Bytes it may hold; other processes that write there at the same time may exceed it
            for a moment.
        context: What all its keys have in common here: LLM, optimiser, versions.
    """

    def __init__(self, folder: Path, limit: int, context: dict[str, Any]) -> None:
        self._folder, self._limit, self._context = folder, limit, context
        self._free = 0

    def _path(self, keys: Sequence[dict[str, Any]]) -> Path:
        return self._folder / f"{fingerprint({'context': self._context, 'jobs': list(keys)})}.pt"

    def recall(self, keys: Sequence[dict[str, Any]]) -> list[LocalResult] | None:
        """Results of clients that trained together, or None; a damaged file counts as absent."""
        path = self._path(keys)
        try:
            saved = torch.load(path, weights_only=True)
            os.utime(path)
            return [LocalResult(**result) for result in saved]
        except Exception:
            return None

    @contextmanager
    def claimed(self, keys: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Wait while another process trains what these keys stand for, and keep others waiting.

        Locks are few, so that they need no cleaning up; keys that share one wait for each other in vain.
        """
        lock = self._folder / f".{self._path(keys).name[:2]}.lock"
        with locked(lock, str(self._folder), wait=True):
            yield

    def keep(self, keys: Sequence[dict[str, Any]], results: Sequence[LocalResult]) -> None:
        """Remember results."""
        buffer = io.BytesIO()
        torch.save([vars(result) for result in results], buffer)
        if self._free < buffer.tell():
            self._free = self._make_room(buffer.tell())
        self._free -= buffer.tell()
        write_atomic(self._path(keys), buffer.getvalue())

    def _make_room(self, size: int) -> int:
        """Delete the oldest until `size` bytes and a tenth of the limit are free; returns what is free."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [(stat.st_mtime_ns, path, stat.st_size) for path, stat in _stats(self._folder)]
        total = sum(length for *_, length in files)
        for _, path, length in sorted(files):
            if total + size + self._limit // 10 <= self._limit:
                break
            path.unlink(missing_ok=True)
            total -= length
        return self._limit - total


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Whole files; another process may delete them, or be writing some, at the same time."""
    for path in folder.glob("*.pt"):
        with suppress(FileNotFoundError):
            yield path, path.stat()
