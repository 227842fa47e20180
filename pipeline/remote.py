"""Files behind a URL: `s3://bucket/prefix`, or any other scheme that fsspec knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO

from pydantic import BeforeValidator, InstanceOf

from fedcmp.pipeline.errors import UserError, one_line

# One plain scheme: fsspec's chains (`a::b://`) could reach further than the address shows.
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "created")


def is_url(value: object) -> bool:
    """Whether a configured path is a URL."""
    return isinstance(value, str) and _URL.match(value) is not None


@dataclass(frozen=True)
class Remote:
    """A file or folder behind a URL, with what sources need of `pathlib.Path`.

    What is missing raises FileNotFoundError; whatever else goes wrong is a UserError, so that a lost
    connection is never taken for a missing picture.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The name's suffix with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Remote:
        """The folder."""
        return Remote(self.url.rstrip("/").rpartition("/")[0])

    def read_bytes(self) -> bytes:
        """The whole file."""
        with self._reached() as (system, path):
            return bytes(system.cat_file(path))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole file as text."""
        return self.read_bytes().decode(encoding)

    @contextmanager
    def open(self, *, here_and_there: bool = False) -> Iterator[BinaryIO]:
        """Stream the file; errors while reading it are UserErrors too.

        Args:
            here_and_there: Fetch just what is asked for, where that is far apart.
        """
        with self._reached() as (system, path):
            file = system.open(path, "rb", **({"cache_type": "none"} if here_and_there else {}))
        try:
            yield _Guarded(self, file)  # type: ignore[misc]
        finally:
            file.close()

    def is_file(self) -> bool:
        """Whether it is there and a file."""
        with self._reached() as (system, path):
            return bool(system.isfile(path))

    def glob(self) -> list[Remote]:
        """Files that this address matches as a pattern, sorted."""
        with self._reached() as (system, path):
            return [Remote(str(system.unstrip_protocol(found))) for found in sorted(system.glob(path))]

    def listing(self) -> dict[str, tuple[int, str]]:
        """Size and version of every file in the folder, by its name relative to it."""
        with self._reached() as (system, path):
            root = path.rstrip("/") + "/"
            found = system.find(path, detail=True)
        return {name.removeprefix(root): _facts(info) for name, info in found.items()}

    def facts(self) -> tuple[int, str] | None:
        """Size and version of the file, None where there is none."""
        try:
            with self._reached() as (system, path):
                return _facts(system.info(path))
        except FileNotFoundError:
            return None

    def fetch(self, path: Path) -> None:
        """Copy the file to a local path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._reached() as (system, remote):
            system.get_file(remote, str(path))

    def send(self, path: Path) -> None:
        """Copy a local file here."""
        with self._reached() as (system, remote):
            system.put_file(str(path), remote)

    def delete(self) -> None:
        """Remove the file where it is there."""
        try:
            with self._reached() as (system, path):
                system.rm_file(path)
        except FileNotFoundError:
            return

    @contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        from fsspec.core import url_to_fs

        # Elsewhere folders need not be made.
        local = {"auto_mkdir": True} if self.url.startswith(("file://", "local://")) else {}
        try:
            # Listings are read afresh: a rerun in the same process must see what changed.
            yield url_to_fs(self.url, use_listings_cache=False, **local)
        except (FileNotFoundError, UserError):
            raise
        except ImportError as error:
            raise UserError(f"{self.url}: {one_line(error)} (S3: pip install 'fedcmp[s3]')") from None
        except Exception as error:
            raise UserError(
                f"{self.url}: cannot be reached: {one_line(error)}; check address, credentials and network, "
                "then run again to go on"
            ) from None


class _Guarded:
    """A stream whose errors name the file."""

    closed = False

    def __init__(self, remote: Remote, file: Any) -> None:
        self._remote, self._file = remote, file

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._file.read(size))
        except Exception as error:
            raise UserError(
                f"{self._remote}: reading it stopped: {one_line(error)}; run again to go on"
            ) from None

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self.closed = True


def _facts(info: dict[str, Any]) -> tuple[int, str]:
    version = next((info[key] for key in _VERSIONS if info.get(key) is not None), "")
    return int(info.get("size") or 0), str(version).strip('"')


def _location(value: Any) -> Any:
    return Remote(value) if is_url(value) else value


Location = Annotated[Path | InstanceOf[Remote], BeforeValidator(_location)]
"""An option that takes a path or a URL."""
