"""Preferences between two answers: read from every usual form, cached, and kept out of all other training."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from fedcmp.extract.sources import text_of
from fedcmp.extract.sources.cells import texts_in
from fedcmp.pipeline.records import Text, Turn

ASKED = Turn("user", "<image>\nIs it red?")
WANTED = Text((ASKED, Turn("assistant", "yes")), "train", "no")

FORMS = {
    "llava": {
        "conversations": [{"from": "human", "value": ASKED.content}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "strings": {"prompt": ASKED.content, "chosen": "yes", "rejected": "no"},
    "question": {"question": ASKED.content, "chosen": "yes", "rejected": "no"},
    "chats": {
        "prompt": [{"role": "user", "content": ASKED.content}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    },
    "whole chats": {
        "chosen": [{"role": "user", "content": ASKED.content}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": ASKED.content}, {"role": "assistant", "content": "no"}],
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it red?"}]}
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "yes"}]}],
        "rejected": "no",
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_usual_form_is_the_same_preference(form: str) -> None:
    assert text_of(FORMS[form], "train") == WANTED
    assert texts_in(json.dumps(FORMS[form]), "train") == ((WANTED,), False)


def test_captions_alone_are_preferences_too() -> None:
    text = text_of({"chosen": "a cat", "rejected": "a dog"}, "train")
    assert text == Text((Turn("assistant", "a cat"),), "train", "a dog")
    assert text.kind == "preference"


@pytest.mark.parametrize("text", [WANTED, Text((Turn("assistant", "ü\n"),), "validation", "")])
def test_encoding_is_undone_by_decoding(text: Text) -> None:
    assert Text.decode(text.encode(), text.kind, text.split) == text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "q", "chosen": "a ", "rejected": "a"}, "are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty"),
        ({"prompt": "q", "chosen": None, "rejected": "a"}, "'chosen' is neither a text nor turns"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "'rejected' is neither"),
        ({"prompt": [], "chosen": [], "rejected": "a"}, "'chosen' is neither"),
        (
            {"prompt": "q", "chosen": {"role": "user", "content": "a"}, "rejected": "b"},
            "not from 'assistant'",
        ),
        (FORMS["whole chats"] | {"rejected": "no"}, "different questions"),
        (FORMS["whole chats"] | {"chosen": "yes"}, "different questions"),
        ({"prompt": "q", "chosen": "yes", "rejected": None}, "'rejected' is neither"),
        ({"prompt": "q", "rejected": False}, "neither 'conversations'"),
    ],
)
def test_what_is_no_preference_is_refused(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(entry, "train")


@pytest.fixture
def mixed(tiny_config, tmp_path):
    """A silo with a caption, a preference, and a preference for validation."""
    images = tmp_path / "mixed"
    images.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), (200, 10, 10)).save(images / f"{name}.png")
    entries = [
        {"image": "a.png", "caption": "a red square"},
        {"image": "a.png", **FORMS["strings"]},
        {"image": "b.png", **FORMS["llava"]},
    ]
    (images / "texts.json").write_text(json.dumps(entries))
    return images
