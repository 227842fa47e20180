"""A silo's sample: one image and what is said about it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, Protocol

IMAGE_PLACEHOLDER = "<image>"
SPLITS = ("train", "validation", "test")
KINDS = ("caption", "conversation")


# Control characters and separators of lines could forge what a terminal shows.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_DRIVE = re.compile("[A-Za-z]:")


def improper(name: str) -> str | None:
    """Why a name cannot be that of an image inside a folder, on any system; None where it can."""
    if not name:
        return "it is empty"
    if _CONTROL.search(name):
        return "it holds control characters"
    if name[0] in "/\\" or _DRIVE.match(name):
        return "it is absolute"
    return "it leads out of its folder" if ".." in name.replace("\\", "/").split("/") else None


@dataclass(frozen=True)
class Turn:
    """One utterance of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Text:
    """A conversation about an image; a bare caption is a single assistant turn.

    What is asked, but not what is trained on, may begin with a system turn.
    """

    turns: tuple[Turn, ...]
    split: str = "train"

    @property
    def kind(self) -> str:
        """`caption` or `conversation`."""
        return "caption" if len(self.turns) == 1 else "conversation"

    def encode(self) -> bytes:
        """UTF-8 bytes as stored in a cache: the caption itself, or a JSON list of turns."""
        if self.kind == "caption":
            return self.turns[0].content.encode()
        return json.dumps([[turn.role, turn.content] for turn in self.turns], ensure_ascii=False).encode()

    @classmethod
    def decode(cls, data: bytes, kind: str, split: str) -> Text:
        """Inverse of `encode`."""
        if kind == "caption":
            return cls((Turn("assistant", data.decode()),), split)
        return cls(tuple(Turn(role, content) for role, content in json.loads(data)), split)


def caption(text: str, split: str = "train") -> Text:
    """A bare caption."""
    return Text((Turn("assistant", text),), split)


def from_llava(conversations: Any, split: str = "train") -> Text:
    """Read LLaVA's `conversations` list of `{"from": "human" | "gpt", "value": ...}`.

    Raises:
        ValueError: Not such a list, roles do not alternate from `human`, or it lacks an answer.
    """
    if not isinstance(conversations, list) or not conversations:
        raise ValueError("'conversations' is not a non-empty list")
    turns = []
    for index, turn in enumerate(conversations):
        wanted = ("human", "gpt")[index % 2]
        if not isinstance(turn, dict) or turn.get("from") != wanted:
            raise ValueError(f"turn {index} of 'conversations' is not from '{wanted}'")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {index} of 'conversations' has no text in 'value'")
        turns.append(Turn("user" if wanted == "human" else "assistant", turn["value"]))
    if len(turns) % 2:
        raise ValueError("'conversations' ends without an answer")
    return Text(tuple(turns), split)


class Readable(Protocol):
    """Where an image can be read: a path, or a file behind a URL."""

    def read_bytes(self) -> bytes:
        """The encoded image file."""


@dataclass(frozen=True)
class Record:
    """One image with its texts; `image` is the encoded file, or where to read it."""

    id: str
    image: bytes | Readable
    texts: tuple[Text, ...]

    def read_image(self) -> bytes:
        """The encoded image file."""
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()
