"""What options there are and what they mean, from the classes that read them."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from fedcmp.pipeline.options import Options

_WORDS: dict[Any, str] = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


@dataclass(frozen=True)
class Option:
    """An option of a table of an experiment file.

    Attributes:
        name: Its name.
        takes: What a value may be.
        default: As it stands in an experiment file, empty where there is none; None where it must be given.
        means: What it is.
    """

    name: str
    takes: str
    default: str | None
    means: str


def options_of(cls: type[Options]) -> list[Option]:
    """All options of a class, in its order."""
    _, meanings = documented(cls)
    return [_option(field, info, meanings.get(field, "")) for field, info in cls.model_fields.items()]


def documented(cls: type[Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph of a class's docstring, and what it and its bases say of their arguments."""
    meanings: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, arguments = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("\nArgs:\n")
        for part in re.split(r"\n(?=    \w)", arguments.split("\n\n")[0]):
            name, colon, text = part.partition(":")
            if colon:
                meanings[name.strip()] = " ".join(text.split())
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split()), meanings


def _option(name: str, info: FieldInfo, means: str) -> Option:
    default = info.get_default(call_default_factory=True)
    if isinstance(default, Options):
        columns = ", ".join(f"{field} = {_toml(value)}" for field, value in default if value is not None)
        told = " ".join(" ".join(inspect.cleandoc(type(default).__doc__ or "").split("\n\n")[1:]).split())
        unset = [field for field, value in default if value is None]
        without = f"By default there is none for {', '.join(unset)}." if unset else ""
        means = " ".join(filter(None, [means, told, without]))
        return Option(name, "table of columns", f"{{ {columns} }}", means)
    takes = _takes(info.annotation)
    return Option(name, takes, None if info.is_required() else _toml(default), means)


def _takes(annotation: Any) -> str:
    """What a value may be, in words."""
    if annotation in _WORDS or isinstance(annotation, str):
        return _WORDS.get(annotation, annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _takes(arguments[0])
    if origin is Literal:
        return ", ".join(_toml(each) for each in arguments)
    if origin in (Union, UnionType):
        if {str, int} <= {*arguments}:
            arguments = ("value", *(each for each in arguments if each not in _WORDS))
        return " or ".join(dict.fromkeys(_takes(each) for each in arguments if each is not NoneType))
    if origin is tuple:
        return f"list of {_takes(arguments[0])}"
    if origin is dict:
        return f"table of {_takes(arguments[1])}"
    return "value"


def _toml(value: Any) -> str:
    """A default as it stands in an experiment file; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict) and value:
        return f"{{ {', '.join(f'{key} = {_toml(each)}' for key, each in value.items())} }}"
    return str(value)
