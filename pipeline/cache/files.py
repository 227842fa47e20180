"""Where a cache's files lie: in its folder, or stored uncompressed in a zip and read in place."""

from __future__ import annotations

import mmap
import os
import stat
import zipfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedcmp.pipeline.cache.format import CorruptCacheError
from fedcmp.pipeline.errors import UserError

_LOCAL_HEADER = 30
# Linux maps more than the page that is read: as much around it as it keeps in one piece.
_AROUND = 1 << 21
_DIRECTORY_LIMIT = 1 << 24
_TOGETHER = 512
_AT_ONCE = 16


class Mapped:
    """A file's bytes through mmap, without keeping more than what is being read in this process.

    Attributes:
        size: Bytes of the file.
        data: `(size,)` uint8, read-only.
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        with path.open("rb") as file:
            # Beyond the end of a file that shrank, an mmap kills the process.
            if os.fstat(file.fileno()).st_size < start + size:
                raise CorruptCacheError(
                    f"{path}: shorter than its manifest says; have it sent or extract it again"
                )
            self._shift = start % mmap.ALLOCATIONGRANULARITY
            length = size + self._shift
            self._mmap = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=start - self._shift)
        self.size = size
        self.data = np.frombuffer(self._mmap, np.uint8, size, self._shift)

    def release(self, start: int, end: int) -> None:
        """Take a range out of this process's memory; it stays in the system's."""
        first = (max(start - _AROUND, 0) + self._shift) & -mmap.PAGESIZE
        last = min(end + _AROUND + self._shift, len(self._mmap))
        self._mmap.madvise(mmap.MADV_DONTNEED, first, max(last - first, 1))


class Ranged:
    """A file's bytes a range at a time; no descriptor is kept, so that any number of files may be in use.

    A file that shrinks while it is in use is an error here, where it would end a process that maps it.

    Attributes:
        size: Bytes of the file.
    """

    def __init__(self, path: Path | str, start: int, size: int) -> None:
        self._path, self._start, self.size = os.fspath(path), start, size

    def read(self, offset: int, *targets: Any) -> None:
        """Fill buffers with the bytes from `offset` on, one after the other.

        Raises:
            CorruptCacheError: The file is shorter.
        """
        left = [memoryview(target).cast("B") for target in targets]
        place = self._start + offset
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while left:
                # Several times only where more is asked for than the system reads at once.
                count = os.preadv(descriptor, left, place)
                if not count:
                    raise CorruptCacheError(
                        f"{self._path}: shorter than its manifest says; have it sent or extract it again"
                    )
                place += count
                while left and count >= len(left[0]):
                    count -= len(left.pop(0))
                if left:
                    left[0] = left[0][count:]
        finally:
            os.close(descriptor)

    def will_need(self, start: int, end: int) -> None:
        """Have the system read a range ahead."""
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, self._start + start, end - start, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


class Files(Protocol):
    """The files of one cache."""

    path: Path

    def size(self, name: str) -> int | None:
        """Bytes of a regular file, None where there is none."""

    def sizes(self, names: Collection[str]) -> Iterator[tuple[str, int | None]]:
        """The same of many files, with their names."""

    def read(self, name: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes."""

    def map(self, name: str, size: int) -> Mapped:
        """A file of which the manifest says `size`, for one pass over it: it keeps a descriptor."""

    def ranged(self, name: str, size: int) -> Ranged:
        """The same, for reads here and there."""


class Folder:
    """Files as they are extracted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def size(self, name: str) -> int | None:
        """Bytes of a regular file; links, also among its folders, lead nowhere."""
        return self._size(name, {"": True})

    def sizes(self, names: Collection[str]) -> Iterator[tuple[str, int | None]]:
        """The same of many files: each folder is looked at once, and slow file systems by many threads."""
        folders = {"": True}
        listed = list(names)
        parts = [listed[first : first + _TOGETHER] for first in range(0, len(listed), _TOGETHER)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for part in pool.map(lambda part: [(name, self._size(name, folders)) for name in part], parts):
                yield from part

    def _size(self, name: str, folders: dict[str, bool]) -> int | None:
        """Of a file whose folders are no links; `folders` holds what is known of them."""
        try:
            if not self._is_folder(name.rpartition("/")[0], folders):
                return None
            found = os.lstat(f"{self.path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _is_folder(self, name: str, folders: dict[str, bool]) -> bool:
        if name not in folders:
            above = self._is_folder(name.rpartition("/")[0], folders)
            folders[name] = above and stat.S_ISDIR(os.lstat(f"{self.path}/{name}").st_mode)
        return folders[name]

    def read(self, name: str, limit: int) -> bytes:
        """A whole file."""
        with (self.path / name).open("rb") as file:
            return _limited(file.read(limit + 1), limit, self.path / name)

    def map(self, name: str, size: int) -> Mapped:
        """A file's bytes."""
        return Mapped(self.path / name, 0, size)

    def ranged(self, name: str, size: int) -> Ranged:
        """A file's bytes."""
        return Ranged(f"{self.path}/{name}", 0, size)


class StoredZip:
    """Files inside a zip that compresses nothing.

    Raises:
        UserError: It is no zip, or some file in it is compressed, encrypted, a link or there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: dict[str, zipfile.ZipInfo] = {}
        self._places: dict[str, tuple[int, int]] = {}
        with open_zip(path) as archive:
            for info in archive.infolist():
                name = info.filename
                if name in self.members:
                    raise UserError(f"{path}: {name!r} is in it twice; do not use it")
                mode = info.external_attr >> 16
                if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
                    raise UserError(f"{path}: {name!r} is a link or no regular file; do not use it")
                if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                    raise UserError(
                        f"{path}: {name!r} is compressed or encrypted; pack it with 'fedcmp cache pack'"
                    )
                if info.compress_size != info.file_size:
                    raise UserError(f"{path}: {name!r} has two sizes; do not use it")
                self.members[name] = info

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        return self.members[name].file_size if name in self.members else None

    def sizes(self, names: Collection[str]) -> Iterator[tuple[str, int | None]]:
        """The same of many files."""
        return ((name, self.size(name)) for name in names)

    def read(self, name: str, limit: int) -> bytes:
        """A whole file."""
        size = self.members[name].file_size
        if size > limit:
            raise CorruptCacheError(f"{self.path}: {name!r} has {size} bytes; do not use it")
        return self.map(name, size).data.tobytes() if size else b""

    def map(self, name: str, size: int) -> Mapped:
        """A file's bytes."""
        return Mapped(self.path, self.place(name)[0], size)

    def ranged(self, name: str, size: int) -> Ranged:
        """A file's bytes."""
        return Ranged(self.path, self.place(name)[0], size)

    def place(self, name: str) -> tuple[int, int]:
        """Where in the zip a file's bytes start, and how many there are.

        Raises:
            CorruptCacheError: There is no file at all.
        """
        if name in self._places:
            return self._places[name]
        info, header = self.members[name], b""
        # What a directory says of its own place can make these negative.
        if info.header_offset >= 0:
            with self.path.open("rb") as file:
                file.seek(info.header_offset)
                header = file.read(_LOCAL_HEADER)
        if len(header) != _LOCAL_HEADER or header[:4] != b"PK\3\4":
            raise CorruptCacheError(f"{self.path}: {name!r} is not where the zip says; have it sent again")
        start = info.header_offset + _LOCAL_HEADER
        start += sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        self._places[name] = start, info.file_size
        return self._places[name]


def open_files(path: Path) -> Files:
    """The files of a cache at a path.

    Raises:
        UserError: It is a zip that cannot be read in place.
    """
    if not path.is_file():
        return Folder(path)
    archive = StoredZip(path)
    if any(name.endswith(".zst") for name in archive.members):
        raise UserError(f"{path}: compressed for transport; unpack it with 'fedcmp cache unpack'")
    return archive


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip whose directory is of a size that fits into memory.

    Raises:
        UserError: It is no whole zip.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 98))
            tail = file.read().rjust(98, b"\0")
            if tail[-22:-18] != b"PK\5\6" or (tail[-42:-38] == b"PK\6\7" and tail[:4] != b"PK\6\6"):
                raise zipfile.BadZipFile("it does not end as a zip does; was it sent as a whole?")
            listed = int.from_bytes(tail[-10:-6], "little")
            if tail[:4] == b"PK\6\6":
                listed = int.from_bytes(tail[40:48], "little")
        if listed > _DIRECTORY_LIMIT:
            raise zipfile.BadZipFile("its directory is larger than any cache's")
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: not a whole stored zip ({error}); have it sent again") from None


def _limited(data: bytes, limit: int, place: Path) -> bytes:
    if len(data) > limit:
        raise CorruptCacheError(f"{place}: longer than {limit} bytes; do not use this cache")
    return data
