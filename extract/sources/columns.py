"""Which columns of a table hold pictures and texts, by names and types usual on Hugging Face's hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fedcmp.pipeline.errors import UserError, did_you_mean

IMAGES = ("image", "images", "img", "picture", "jpg", "jpeg", "png", "webp", "image_path", "file_name")
TEXTS = ("conversations", "conversation", "messages", "texts", "text", "captions", "caption")
# What is asked, where two other columns hold the answers.
_ASKED = ("conversations", "conversation", "messages", "prompt", "question")
ANSWERS = ("chosen", "rejected")
# The two fields of a turn, or of a question with its answer, by which a list of structs is one of texts.
_TURNS = ({"from", "value"}, {"role", "content"}, {"user", "assistant"})

Names = Literal["paths", "fields", "none"]


@dataclass(frozen=True)
class Columns:
    """Names of columns.

    Attributes:
        image: Pictures.
        text: Texts, None where there are none.
        id: Names of pictures, None where the pictures' own are taken.
        label: What a partition goes by, None where none does.
        answers: A chosen answer and a rejected one, none where texts are no preferences.
        named: How a picture names itself: its column holds `paths`, or structs with such `fields`.
    """

    image: str
    text: str | None
    id: str | None
    label: str | None
    named: Names
    answers: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = {"paths": "paths of pictures", "fields": "pictures with paths", "none": "pictures"}[self.named]
        columns = [*filter(None, [self.text]), *self.answers]
        texts = f"texts in {listed(columns)}" if columns else "no texts"
        return f"{what} in {listed([self.image])} and {texts}"

    def wanted(self, only: Literal["names", "paths"] | None) -> tuple[list[str], str | None]:
        """Arguments of `Table.batches`: columns to read, and that of which names alone are.

        Args:
            only: What they are read for, None for everything.
        """
        if only is None:
            return list(
                dict.fromkeys(filter(None, (self.image, self.text, *self.answers, self.id, self.label)))
            ), None
        if only == "names" and self.id is not None:
            return [self.id], None
        return [self.image] if self.named != "none" else [], self.image if self.named == "fields" else None


def listed(columns: Iterable[str]) -> str:
    """Names of columns for people."""
    return _plain(", ".join(columns))


def recognise(
    schema: Any,
    place: str,
    *,
    image: str | None,
    text: str | None,
    id: str | None,
    label: str | None = None,
) -> Columns:
    """Find the columns of a `pyarrow.Schema`; those that options name are taken, and checked.

    Args:
        schema: Names and types.
        place: The file, for errors.
        image: Option of this name.
        text: Option of this name.
        id: Option of this name.
        label: Column that a partition goes by.

    Raises:
        UserError: One is missing, holds something else, or could be one of several.
    """
    types = {field.name: field.type for field in schema}

    def given(option: str, column: str, holds: Callable[[Any], bool], what: str) -> str:
        if column not in types:
            hint = did_you_mean(column, map(_plain, list(types)[:50]))
            raise UserError(f"{place}: {option} = '{column}': no such column{hint}")
        if not holds(types[column]):
            kind = _plain(str(types[column]))
            raise UserError(f"{place}: {option} = '{column}' holds {kind}; expected {what}")
        return column

    if image is not None:
        what = "encoded files, paths, structs of bytes and path, or lists of one of these"
        given("image", image, _is_picture, what)
    else:
        image = _image(types, place)
    both = all(column in types and _is_said(types[column]) for column in ANSWERS)
    # A column of captions asks nothing: whoever names it wants captions.
    answers = ANSWERS if both and (text not in TEXTS or text in _ASKED) else ()
    if text is not None:
        given("text", text, _is_text, "captions, lists of captions, or turns of a conversation")
    else:
        text = _text(types, place, _ASKED if answers else TEXTS)
    for option, column in (("id", id), ("--field", label)):
        if column is not None:
            given(option, column, lambda kind: _is_string(kind) or _is_integer(kind), "strings or integers")
    return Columns(image, text, id, label, _named(types[image]), answers)


def _image(types: dict[str, Any], place: str) -> str:
    structs = [column for column, kind in types.items() if _holds(kind, _is_picture_struct)]
    usual = [column for column in IMAGES if column in structs]
    if len(structs) > 1 and len(usual) != 1:
        raise UserError(f"{place}: pictures are in {listed(structs)}; set 'image' to one of them")
    plain = [
        column
        for holds in (_is_binary, _is_path)
        for column in IMAGES
        if column in types and _holds(types[column], holds)
    ]
    found = [*usual, *structs, *plain]
    if not found:
        raise UserError(f"{place}: no column of pictures among {listed(types)}; set 'image' to its name")
    return found[0]


def _text(types: dict[str, Any], place: str, usual: tuple[str, ...]) -> str | None:
    found = [column for column in usual if column in types and _is_text(types[column])]
    if len(found) > 1:
        raise UserError(f"{place}: texts are in {listed(found)}; set 'text' to one of them")
    return found[0] if found else None


def _named(kind: Any) -> Names:
    if _holds(kind, _is_path):
        return "paths"
    return "fields" if _holds(kind, lambda part: _has(part, "path", _is_string)) else "none"


def _is_picture(kind: Any) -> bool:
    return any(_holds(kind, what) for what in (_is_picture_struct, _is_binary, _is_path))


def _is_picture_struct(kind: Any) -> bool:
    return _has(kind, "bytes", _is_binary)


def _is_path(kind: Any) -> bool:
    """Whether a column only names pictures."""
    return _is_string(kind) or (_has(kind, "path", _is_string) and not _is_picture_struct(kind))


def _has(kind: Any, field: str, what: Callable[[Any], bool]) -> bool:
    return _is_struct(kind) and field in _fields(kind) and what(kind.field(field).type)


def _is_text(kind: Any) -> bool:
    return _holds(kind, _is_string) or (
        _is_list(kind)
        and _is_struct(kind.value_type)
        and any(turn <= set(_fields(kind.value_type)) for turn in _TURNS)
    )


def _is_said(kind: Any) -> bool:
    """Whether a column holds answers: texts, or turns."""
    return _is_text(kind) or (_is_struct(kind) and any(turn <= set(_fields(kind)) for turn in _TURNS))


def _holds(kind: Any, what: Callable[[Any], bool]) -> bool:
    """Whether a column holds something, or lists of it."""
    return what(kind) or (_is_list(kind) and what(kind.value_type))


def _plain(text: str) -> str:
    """What a file says, on one line of bounded length."""
    return (text if text.isprintable() else ascii(text)[1:-1])[:300]


def _fields(kind: Any) -> list[str]:
    return [kind.field(place).name for place in range(kind.num_fields)]


def _is_struct(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_struct(kind))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind))


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _is_integer(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_integer(kind))


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
