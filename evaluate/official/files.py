"""Reading benchmarks' official files: what is not of their form is one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fedcmp.pipeline.errors import UserError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """An entry of a file that cannot be asked, in words that name it."""

    reason: str


def read_text_file(path: Path, what: str) -> str:
    """A benchmark file, whole.

    Raises:
        UserError: It is missing or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {what} is not UTF-8 ({error}); convert it first") from None


def read_json_file(path: Path, what: str) -> Any:
    """A benchmark's JSON file.

    Raises:
        UserError: It is missing, not UTF-8 or not JSON.
    """
    try:
        return json.loads(read_text_file(path, what))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} is not valid JSON: {error}") from None


def json_lines(path: Path, what: str) -> Iterator[tuple[str, Any]]:
    """Every line of a JSON-lines file with its place; a bad line comes as a `Problem`.

    Raises:
        UserError: The file is missing.
    """
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path}: {what} cannot be read ({error.strerror})") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            yield place, json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            yield place, Problem(f"{place}: not valid JSON: {error}")


def entries(path: Path, what: str, *keys: str) -> Iterator[tuple[str, Any]]:
    """Every entry of a list in a JSON file with its place; `keys` lead to the list.

    Raises:
        UserError: The file cannot be read, or there is no such list.
    """
    content = read_json_file(path, what)
    for key in keys:
        content = field(content, key, str(path))
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of {what}, found {type(content).__name__}")
    for number, entry in enumerate(content):
        yield f"{path}[{number}]", entry


def attempt(make: Callable[[Any, str], T], entry: Any, place: str) -> T | Problem:
    """What is made of an entry, or the problem with it."""
    if isinstance(entry, Problem):
        return entry
    try:
        return make(entry, place)
    except UserError as error:
        return Problem(str(error))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        return Problem(f"{place}: not as in the official file ({type(error).__name__}: {one_line(error)})")


def field(entry: Any, name: str, place: str) -> Any:
    """A field of an entry.

    Raises:
        UserError: It is not there.
    """
    if not isinstance(entry, dict) or name not in entry:
        raise UserError(f"{place}: no field '{name}'; is this the official file?")
    return entry[name]


def string(entry: Any, name: str, place: str) -> str:
    """A field of an entry that must be text.

    Raises:
        UserError: It is missing, or something else.
    """
    value = field(entry, name, place)
    if not isinstance(value, str):
        raise UserError(f"{place}: '{name}' is {value!r}, not text")
    return value


def strings(entry: Any, name: str, place: str) -> list[str]:
    """A field of an entry that must be a list of texts, not empty.

    Raises:
        UserError: It is missing, or something else.
    """
    values = field(entry, name, place)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise UserError(f"{place}: '{name}' is not a list of texts")
    return values


def file_name(pattern: str, image_id: Any) -> str:
    """The name of an image's file from its id.

    Raises:
        UserError: The pattern does not fit the id.
    """
    try:
        return pattern.format(image_id=image_id)
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"image_name = {pattern!r} does not fit image id {image_id!r}: {error}") from None


def to_json(value: Any) -> bytes:
    """A submission file's bytes."""
    return json.dumps(value, ensure_ascii=False).encode()
