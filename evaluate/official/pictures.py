"""Pictures in tables: bytes, Hugging Face's `{bytes, path}`, base64, or the name of a file."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import write_atomic

_SIGNATURES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\x00": ".tif",
    b"MM\x00*": ".tif",
}
_HEAD = 16
_SHORTEST = 64  # as VLMEvalKit has it: what is shorter names something


def picture(value: Any, place: str) -> bytes | str | int:
    """An encoded picture from a cell, or what names it: a file, or another row.

    Args:
        value: The cell; a list of one is that one.
        place: Names the cell in errors.

    Raises:
        UserError: There is none, there are several, or its base64 is broken.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(f"{place}: {len(value)} images, not one")
        value = value[0]
    if isinstance(value, dict):
        inside, path = value.get("bytes"), value.get("path")
        value = path if inside is None else inside
    if isinstance(value, bytes | int) and not isinstance(value, bool) and value != b"":
        return value
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: no image")
    return _decoded(value.strip(), place)


def _decoded(text: str, place: str) -> bytes | str:
    """A text as it is, or the picture that it is the base64 of."""
    is_url = text.startswith("data:")
    coded = text.partition(",")[2] if is_url else text
    if len(coded) <= _SHORTEST or not (is_url or _begins_like_a_picture(coded)):
        return text
    try:
        return base64.b64decode("".join(coded.split()), validate=True)
    except binascii.Error as error:
        raise UserError(f"{place}: the image is not base64: {one_line(error)}") from None


def _begins_like_a_picture(coded: str) -> bool:
    try:
        head = base64.b64decode("".join(coded[: 2 * _HEAD].split())[:_HEAD], validate=True)
    except binascii.Error:
        return False
    return head.startswith(tuple(_SIGNATURES))


def write_pictures(pictures: Iterable[tuple[str, bytes]], folder: Path) -> None:
    """Write pictures by their names in a folder; files that are there stay."""
    for name, data in pictures:
        if not (folder / name).is_file():
            write_atomic(folder / name, data)


def picture_name(data: bytes) -> str:
    """A file's name for a picture, by its content: the same picture in several rows is one."""
    kinds = (suffix for signature, suffix in _SIGNATURES.items() if data.startswith(signature))
    return hashlib.sha256(data).hexdigest()[:32] + next(kinds, ".jpg")
