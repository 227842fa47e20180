"""Entries of a JSON list or of JSON lines, one at a time, and the byte of the file at which each begins."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NoReturn

from fedcmp.extract.sources.base import json_line
from fedcmp.pipeline.errors import UserError

CHUNK = 1 << 20
BLANK = object()
"""A line without an entry, which `null` is not."""
# A cut `-Infinity`, `\uD83D` or `1e-5` is at most so many characters from the end of what was read.
_CUT = 16
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def list_entries(file: BinaryIO, name: str, chunk: int = CHUNK) -> Iterator[tuple[int, Any]]:
    """Each entry of a file with one JSON list, after the byte that it begins at.

    Args:
        file: UTF-8, with or without a mark of byte order.
        name: What errors call it.
        chunk: Bytes to read at a time; more where an entry is larger.

    Raises:
        UserError: The file is not UTF-8, not valid JSON, or no list.
    """
    text = _Text(file, name, chunk)
    if text.peek() != "[":
        found = text.value()
        if text.peek():
            text.fail("Extra data")
        raise UserError(f"{name}: expected a list of entries, found {type(found).__name__}")
    text.step()
    mark = text.peek()
    while mark != "]":
        text.peek()
        yield text.byte, text.value()
        mark = text.peek()
        if mark not in (",", "]"):
            text.fail("Expecting ',' delimiter")
        if mark == ",":
            text.step()
    text.step()
    if text.peek():
        text.fail("Extra data")


def line_entries(file: BinaryIO, name: str) -> Iterator[tuple[int, Any]]:
    """Each line of a file with the byte that it begins at: its entry, a `Skipped`, or `BLANK`.

    Args:
        file: UTF-8, with or without a mark of byte order.
        name: What errors call it; a line is at `name:1` and so on.

    Raises:
        UserError: The file is not UTF-8.
    """
    byte = _after_mark(file)
    # A file in binary mode ends lines at \n alone, as JSON lines do.
    for number, line in enumerate(file, 1):
        yield byte, line_entry(line, f"{name}:{number}", name, byte)
        byte += len(line)


def line_entry(line: bytes, place: str, name: str, byte: int) -> Any:
    """The entry in one line of JSON lines; a `Skipped` where it is not JSON, or `BLANK`.

    Raises:
        UserError: The line is not UTF-8.
    """
    try:
        text = line.removesuffix(b"\n").decode()
    except UnicodeDecodeError as error:
        _not_utf8(name, byte + error.start, error)
    return json_line(place, text) if text.strip() else BLANK


def first_value(text: str) -> Any:
    """The JSON value that a text begins with.

    Raises:
        ValueError: It begins with none.
    """
    return _DECODER.raw_decode(text)[0]


class _Text:
    """A file's text, of which what is not yet read and a chunk more are in memory.

    Attributes:
        byte: The place in the file.
    """

    def __init__(self, file: BinaryIO, name: str, chunk: int) -> None:
        self.byte = self._taken = _after_mark(file)
        self._file, self._name, self._chunk = file, name, chunk
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        # Of what is no longer in memory: characters, line ends, and where its last line began.
        self._chars = self._lines = self._line_start = 0

    def peek(self) -> str:
        """The next character that is no white space, which is passed; nothing at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def step(self) -> None:
        """Pass a character of one byte."""
        self._advance(self._at + 1)

    def value(self) -> Any:
        """The value that begins here, which is passed.

        Raises:
            UserError: None does.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if self._is_final(error) or not self._more():
                    if isinstance(error, json.JSONDecodeError):
                        self.fail(error.msg, error.pos)
                    self.fail(str(error))
                continue
            # Of a number more digits may follow.
            if end + _CUT <= len(self._text) or not self._more():
                self._advance(end)
                return value

    def fail(self, why: str, at: int | None = None) -> NoReturn:
        """Say what is wrong, here or at a place in what is in memory."""
        at = self._at if at is None else at
        before = self._text.rfind("\n", 0, at)
        line = 1 + self._lines + self._text.count("\n", 0, at)
        column = 1 + self._chars + at - (self._line_start if before < 0 else self._chars + before + 1)
        place = f"line {line} column {column} (char {self._chars + at})"
        raise UserError(f"{self._name}: not valid JSON: {why}: {place}") from None

    def _is_final(self, error: ValueError | RecursionError) -> bool:
        """Whether it stays an error, whatever follows what is in memory."""
        if isinstance(error, json.JSONDecodeError):
            # A string without end is reported where it starts.
            return not error.msg.startswith("Unterminated") and error.pos + _CUT <= len(self._text)
        # An integer of too many digits is none if it goes on as a fraction.
        return isinstance(error, RecursionError) or self._text[-1] not in "0123456789.eE+-"

    def _advance(self, to: int) -> None:
        ascii_ = self._text.isascii()
        self.byte += to - self._at if ascii_ else len(self._text[self._at : to].encode())
        self._at = to

    def _more(self) -> bool:
        """Read on, at least as much as is waiting, so that a large value is tried a few times only."""
        if self._ended:
            return False
        waiting = len(self._text) - self._at
        data = self._file.read(max(self._chunk, waiting))
        self._ended = not data
        self._taken += len(data)
        try:
            text = self._decoder.decode(data, final=self._ended)
        except UnicodeDecodeError as error:
            _not_utf8(self._name, self._taken - len(error.object) + error.start, error)
        if self._ended:
            return False
        line_end = self._text.rfind("\n", 0, self._at)
        if line_end >= 0:
            self._line_start = self._chars + line_end + 1
        self._lines += self._text.count("\n", 0, self._at)
        self._chars += self._at
        self._text, self._at = self._text[self._at :] + text, 0
        return True


def _after_mark(file: BinaryIO) -> int:
    """Where the text begins: after a mark of byte order, if there is one."""
    start = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    return file.seek(start)


def _not_utf8(name: str, byte: int, error: UnicodeDecodeError) -> NoReturn:
    raise UserError(f"{name}: not UTF-8 (byte {byte}: {error.reason}); convert it first") from None
