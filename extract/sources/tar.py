"""Files of a tar as it streams by, in memory that grows with the tar and not with what it claims."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from fedcmp.extract.sources import Skipped, printable

# No picture that Pillow opens is longer: it refuses more than 179 million pixels.
_LARGEST_FILE = 1 << 29
_LARGEST_NAME = 1 << 20
_BLOCK = 1 << 20
# Pictures shrink little; zeros shrink a thousandfold.
_GROWTH, _GROWTH_FROM = 200, 1 << 26
_META = re.compile(r"__[^/]*__($|/)")
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_HEADERS = (*_NAMES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)


def files_of(shard: str, stream: BinaryIO) -> Iterator[tuple[str, bytes] | Skipped]:
    """Names and bytes of the regular files in a tar, compressed or not, in their order.

    webdataset's own files, `__index__` and the like, are left out as it leaves them out.

    Raises:
        tarfile.TarError: It is damaged, or grows as nothing but an attack does. Whatever else the
            decompressors raise on damage passes, too.
    """
    counted = _Counted(stream)
    with tarfile.open(fileobj=counted, mode="r|*", tarinfo=_Header) as tar:  # type: ignore[call-overload]
        for info in tar:
            # tarfile keeps what it has read about every file.
            tar.members = []
            if not info.isreg() or _META.match(info.name):
                continue
            place = f"{shard}:{printable(info.name)}"
            if info.issparse():
                yield Skipped(place, "a sparse file; pack it without --sparse")
            elif info.size > _LARGEST_FILE:
                yield Skipped(place, f"its {info.size} bytes are more than {_LARGEST_FILE}")
            else:
                yield info.name, _content(tar, info, counted)


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, counted: _Counted) -> bytes:
    file, data = tar.extractfile(info), bytearray()
    assert file is not None
    while len(data) < info.size:
        block = file.read(min(_BLOCK, info.size - len(data)))
        if not block:
            raise tarfile.ReadError("unexpected end of data")
        data += block
        grown = info.offset_data + len(data)
        if grown > max(_GROWTH * counted.bytes, _GROWTH_FROM):
            raise tarfile.ReadError(f"{counted.bytes} bytes became {grown}; no pictures do that")
    return bytes(data)


class _Header(tarfile.TarInfo):
    """What stands before a file, of a size that fits into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            # After the first file, tarfile takes a HeaderError for the end.
            raise tarfile.ReadError(str(error)) from None
        if header.size < 0 or (header.type in _HEADERS and header.size > _LARGEST_NAME):
            raise tarfile.ReadError(f"a name of {header.size} bytes")
        return header


class _Counted:
    """A stream, and how many bytes of it were read."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.bytes = stream, 0

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self.bytes += len(data)
        return data
