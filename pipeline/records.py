"""A silo's sample: one image and what is said about it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

IMAGE_PLACEHOLDER = "<image>"
SPLITS = ("train", "validation", "test")
KINDS = ("caption", "conversation", "preference")


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

    What is asked, but not what is trained on, may begin with a system turn. Where somebody preferred the last
    answer to another one, that one is `rejected`.
    """

    turns: tuple[Turn, ...]
    split: str = "train"
    rejected: str | None = None

    @property
    def kind(self) -> str:
        """`caption`, `conversation`, or `preference` between two answers."""
        if self.rejected is not None:
            return "preference"
        return "caption" if len(self.turns) == 1 else "conversation"

    def encode(self) -> bytes:
        """UTF-8 bytes as stored in a cache: the caption itself, or JSON of the turns."""
        if self.kind == "caption":
            return self.turns[0].content.encode()
        turns = [[turn.role, turn.content] for turn in self.turns]
        value = turns if self.rejected is None else [turns, self.rejected]
        return json.dumps(value, ensure_ascii=False).encode()

    @classmethod
    def decode(cls, data: bytes, kind: str, split: str) -> Text:
        """Inverse of `encode`.

        Raises:
            ValueError, TypeError, RecursionError: It is no text of this kind.
        """
        if kind == "caption":
            return cls((Turn("assistant", data.decode()),), split)
        turns, rejected = json.loads(data), None
        if kind == "preference":
            turns, rejected = turns
            if not isinstance(rejected, str):
                raise TypeError("the rejected answer is no text")
        return cls(tuple(Turn(role, content) for role, content in turns), split, rejected)


def caption(text: str, split: str = "train") -> Text:
    """A bare caption."""
    return Text((Turn("assistant", text),), split)


def from_llava(conversations: Any, split: str = "train") -> Text:
    """Read LLaVA's `conversations` list of `{"from": "human" | "gpt", "value": ...}`.

    Raises:
        ValueError: Not such a list, roles do not alternate from `human`, or it lacks an answer.
    """
    return Text(_turns(conversations, "conversations", "from", ("human", "gpt"), "value"), split)


def from_chat(messages: Any, split: str = "train") -> Text:
    """Read chat `messages`, a list of `{"role": "user" | "assistant", "content": ...}`.

    Content is a string, or a list of parts such as `{"type": "text", "text": ...}` and `{"type": "image"}`.

    Raises:
        ValueError: Not such a list, roles do not alternate from `user`, or it lacks an answer.
    """
    return Text(_turns(messages, "messages", "role", ("user", "assistant"), "content"), split)


def from_preference(entry: Mapping[str, Any], split: str = "train") -> Text:
    """Read two answers to one question, of which `chosen` was preferred to `rejected`.

    What is asked is in `conversations`, `messages`, `prompt` or `question`, or repeated before both answers;
    where nothing is, they are captions. All of them may be strings, or turns as LLaVA or chats have them.

    Raises:
        ValueError: One is missing or no answer, they answer different questions, or are the same.
    """
    chosen, rejected = (_messages(entry.get(name), name, "assistant") for name in ("chosen", "rejected"))
    asked = next((_messages(entry[name], name, "user") for name in ASKED if entry.get(name)), [])
    if max(len(chosen), len(rejected)) > 1:
        asked = chosen[:-1]
        if rejected[:-1] != asked:
            raise ValueError("'chosen' and 'rejected' answer different questions")
    better, worse = (
        (from_chat([*asked, answer]) if asked else from_chat([_NOTHING, answer])).turns
        for answer in (chosen[-1], rejected[-1])
    )
    if better[-1].content.strip() == worse[-1].content.strip():
        raise ValueError("'chosen' and 'rejected' are the same")
    return Text(better if asked else better[1:], split, worse[-1].content)


ASKED = ("conversations", "messages", "prompt", "question")
_NOTHING = {"role": "user", "content": ""}
_LLAVA = {"human": "user", "gpt": "assistant"}


def _messages(value: Any, what: str, role: str) -> list[dict[str, Any]]:
    """A string, a turn, or a list of turns as a chat's messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = value if isinstance(value, list) else [value]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"'{what}' is neither a text nor turns")
    return [
        {"role": _LLAVA.get(turn["from"]), "content": turn.get("value")} if "from" in turn else turn
        for turn in turns
    ]


def _turns(entries: Any, what: str, speaker: str, speakers: tuple[str, str], said: str) -> tuple[Turn, ...]:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"'{what}' is not a non-empty list")
    turns = []
    for index, entry in enumerate(entries):
        wanted = speakers[index % 2]
        if not isinstance(entry, dict) or entry.get(speaker) != wanted:
            raise ValueError(f"turn {index} of '{what}' is not from '{wanted}'")
        content = entry.get(said)
        if isinstance(content, list) and said == "content":
            content = "\n".join(_part(part, f"turn {index} of '{what}'") for part in content)
        if not isinstance(content, str):
            raise ValueError(f"turn {index} of '{what}' has no text in '{said}'")
        turns.append(Turn("assistant" if index % 2 else "user", content))
    if len(turns) % 2:
        raise ValueError(f"'{what}' ends without an answer")
    return tuple(turns)


def _part(part: Any, place: str) -> str:
    """A part of a message's content as text, an image as its placeholder."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("image", "image_url"):
        return IMAGE_PLACEHOLDER
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ValueError(f"{place} has a part that is neither text nor image")


class Readable(Protocol):
    """Where an image can be read: a path, or a file behind a URL."""

    def read_bytes(self) -> bytes:
        """The encoded image file."""


@dataclass(frozen=True)
class Record:
    """One image with its texts.

    Attributes:
        id: Its name.
        image: The encoded file, or where to read it.
        texts: What is said about it.
        labels: What a column says beside each text, where a partition has asked for it.
    """

    id: str
    image: bytes | Readable
    texts: tuple[Text, ...]
    labels: tuple[str | int | None, ...] = ()

    def read_image(self) -> bytes:
        """The encoded image file."""
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()
