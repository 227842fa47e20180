"""What a cell of a table holds, as Python has it: a picture with its name, or texts."""

from __future__ import annotations

import json
import re
from typing import Any

from fedcmp.extract.sources import Location, Text, image_name, texts_of
from fedcmp.pipeline.records import improper

# No picture that Pillow opens is longer: it refuses more than 179 million pixels.
_LARGEST = 1 << 29
# How turns begin that were written as a string.
_WRITTEN = re.compile(
    r'\s*(\[\s*)?\{\s*"(from|value|role|content|conversations|messages|user|assistant|prompt|question|chosen|rejected)"\s*:'
)


def name_in(cell: Any) -> str | None:
    """What a picture with bytes calls itself; None where that is nothing that could name a file in a folder.

    `datasets` keeps the path that the file once had, often without its folders: pictures of one name
    may differ.
    """
    cell = _single(cell)
    path = cell.get("path") if isinstance(cell, dict) else None
    if not isinstance(path, str):
        return None
    name = re.split(r"[/\\]", path)[-1] if improper(path) else path
    return None if improper(name) else name


def path_in(cell: Any, images: Location) -> str:
    """The path of a picture that a cell only names, relative to its folder.

    Raises:
        ValueError: It names none, several, or one outside.
    """
    cell = _single(cell)
    return image_name(cell.get("path") if isinstance(cell, dict) else cell, "images", images)


def bytes_in(cell: Any) -> bytes | None:
    """The encoded file in a cell, None where it only names one.

    Raises:
        ValueError: There is no picture, or more than one.
    """
    if isinstance(cell, list) and len(cell) > 1:
        raise ValueError(f"it holds {len(cell)} images; one is read")
    cell = _single(cell)
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(data, bytes):
        if len(data) > _LARGEST:
            raise ValueError(f"its {len(data)} bytes are more than {_LARGEST}")
        if data:
            return data
    if not (cell.get("path") if isinstance(cell, dict) else isinstance(data, str) and data):
        raise ValueError("there is no image in it")
    return None


def texts_in(cell: Any, split: str) -> tuple[tuple[Text, ...], bool]:
    """The texts of a cell, and whether a system message before them was left out.

    Args:
        cell: A caption, a list of captions of which empty ones are ignored, turns as LLaVA or chats have
            them, pairs of `user` and `assistant`, or JSON of any of these turns.
        split: What they are for.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(cell, str) and _WRITTEN.match(cell):
        cell = json.loads(cell)
    if isinstance(cell, dict) and "chosen" in cell:
        return texts_of(cell, split), False
    several = cell if isinstance(cell, list) else [cell]
    if all(text is None or (isinstance(text, str) and not text.strip()) for text in several):
        raise ValueError("its text is empty")
    if all(text is None or isinstance(text, str) for text in several):
        return texts_of([text for text in several if text and text.strip()], split), False
    system = _speaker(several[0]) == "system"
    turns = several[1:] if system else several
    if not turns:
        raise ValueError("nothing but a system message is in it")
    if turns and all(isinstance(turn, dict) and {"user", "assistant"} <= turn.keys() for turn in turns):
        turns = [{"role": role, "content": turn[role]} for turn in turns for role in ("user", "assistant")]
    return texts_of(turns, split), system


def _single(cell: Any) -> Any:
    return (cell[0] if cell else None) if isinstance(cell, list) else cell


def _speaker(turn: Any) -> Any:
    return turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
