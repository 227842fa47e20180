"""What a machine ran short of: that may pass, so it stops a run and leaves no hole in a cache."""

from __future__ import annotations

import errno

_ERRNO = {
    errno.ENOMEM: "memory",
    errno.EAGAIN: "threads",
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
    errno.ENOSPC: "disk space",
    errno.EDQUOT: "disk space",
}
_SAID = {
    "can't start new thread": "threads",
    "out of memory": "memory",
    "not enough memory": "memory",
    "can't allocate memory": "memory",
    "unable to allocate": "memory",
    "too many open files": "file descriptors",
}
_REMEDY = {
    "memory": "not enough memory; lower extract.workers or extract.batch_size, or raise the limit",
    "threads": "no more threads can be started; lower extract.workers, or raise 'ulimit -u' or memory",
    "file descriptors": "too many open files; raise 'ulimit -n'",
    "disk space": "the disk is full; free some space",
}
_ROOM = 1 << 28


def shortage(error: BaseException) -> str | None:
    """The remedy where an error says that memory, threads, files or disk ran out; None where it does not."""
    if isinstance(error, MemoryError):
        return _REMEDY["memory"]
    if isinstance(error, OSError) and error.errno is not None:
        return _REMEDY.get(_ERRNO.get(error.errno, ""))
    said = str(error).lower() if isinstance(error, OSError | RuntimeError) else ""
    return next((_REMEDY[what] for words, what in _SAID.items() if words in said), None)


def require_room() -> None:
    """Make sure that memory for one large picture is left: some decoders report a lack of it as damage.

    Raises:
        MemoryError: There is none.
    """
    bytearray(_ROOM)
