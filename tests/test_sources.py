from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import CAPTIONS, conversation, picture, write_llava, write_shard

from extract.sources.base import Skipped
from extract.sources.llava_json import LlavaJson
from extract.sources.webdataset import WebDataset
from pipeline.errors import UserError
from pipeline.records import Record, Text, Turn


def split(items: list[Record | Skipped]) -> tuple[list[Record], list[Skipped]]:
    records = [item for item in items if isinstance(item, Record)]
    return records, [item for item in items if isinstance(item, Skipped)]


def test_llava_json_groups_texts_by_image(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 3)
    entries = json.loads(path.read_text())
    again = conversation(1)
    again["conversations"][1]["value"] = "Another text"
    path.write_text(json.dumps([*entries, again, entries[0], {"id": 7}, "text", {"image": "a.png"}]))
    records, skipped = split(list(LlavaJson(path=path, images=tmp_path).records()))
    assert [record.id for record in records] == [f"scans/{n:03d}.png" for n in range(3)]
    assert [len(record.texts) for record in records] == [1, 2, 1]
    assert records[0].read_image() == picture(0)
    assert records[0].texts[0].turns == (
        Turn("user", "Describe it.\n<image>"),
        Turn("assistant", f"{CAPTIONS[0]} 0"),
    )
    assert [(item.place.removeprefix(str(path)), item.reason) for item in skipped] == [
        ("[4]", "the same text about 'scans/000.png' came before"),
        ("[5]", "it names no image"),
        ("[6]", "it names no image"),
        ("[7]", "neither 'conversations' nor 'caption' is in it"),
    ]


def test_jsonl_skips_bad_lines_by_number(tmp_path: Path) -> None:
    write_llava(tmp_path, 3)
    lines = [json.dumps(conversation(0)), "{broken", "", json.dumps(conversation(2))]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    records, skipped = split(list(LlavaJson(path=path, images=tmp_path).records()))
    assert [record.id for record in records] == ["scans/000.png", "scans/002.png"]
    assert [item.place for item in skipped] == [f"{path}:2"]
    assert "not valid JSON" in skipped[0].reason


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{broken", "not valid JSON"), (b"{}", "expected a list"), (b'["\xff"]', "not UTF-8")],
)
def test_an_unusable_json_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(LlavaJson(path=path, images=tmp_path).records())


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [{"from": "gpt", "value": "x"}],
        [{"from": "human", "value": "x"}],
        [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}],
        "text",
    ],
)
def test_malformed_conversations_are_skipped(tmp_path: Path, turns: object) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
    records, skipped = split(list(LlavaJson(path=path, images=tmp_path).records()))
    assert not records
    assert len(skipped) == 1


def test_identity_sees_texts_and_images(tmp_path: Path) -> None:
    path = write_llava(tmp_path, 3)
    source = LlavaJson(path=path, images=tmp_path)
    first = source.identity()
    assert source.identity() == first
    (tmp_path / "scans" / "001.png").write_bytes(picture(99))
    second = source.identity()
    path.write_text(path.read_text() + "\n")
    third = source.identity()
    assert first != second
    assert second != third


def test_webdataset_reads_texts_of_every_form(tmp_path: Path) -> None:
    several = [conversation(2), {"caption": " a caption "}, "plain"]
    samples = [
        {"__key__": "a", "png": picture(0), "txt": b"Zwei Hunde\n"},
        {"__key__": "b", "jpg": picture(1, form="jpeg"), "json": json.dumps(conversation(1)).encode()},
        {"__key__": "c", "webp": picture(2, form="webp"), "json": json.dumps(several).encode()},
        {"__key__": "d", "txt": b"no image"},
        {"__key__": "e", "png": picture(3), "json": b"{broken"},
        {"__key__": "a", "png": picture(4), "txt": b"again"},
    ]
    write_shard(tmp_path / "0.tar", [*samples[:3], samples[5]])
    write_shard(tmp_path / "1.tar", samples[3:5])
    records, skipped = split(list(WebDataset(path=f"{tmp_path}/{{0..1}}.tar").records()))
    assert [record.id for record in records] == ["a.png", "b.jpg", "c.webp"]
    assert records[0].texts == (Text((Turn("assistant", "Zwei Hunde"),)),)
    assert [text.kind for text in records[2].texts] == ["conversation", "caption", "caption"]
    assert [item.place.split(":")[-1] for item in skipped] == ["a", "d", "e"]


def test_keys_that_start_again_in_every_shard_are_kept_apart(tmp_path: Path) -> None:
    for shard in range(2):
        samples = [{"__key__": "0000", "png": picture(shard), "txt": b"words"}]
        write_shard(tmp_path / f"{shard}.tar", [samples[0], samples[0] | {"__key__": "0001"}])
    records, skipped = split(list(WebDataset(path=f"{tmp_path}/*.tar").records()))
    assert [record.id for record in records] == ["0000.png", "0001.png", "1/0000.png", "1/0001.png"]
    assert not skipped


def test_line_separators_inside_a_text_end_no_line(tmp_path: Path) -> None:
    entry = {"image": "a.png", "caption": "one\u2028two\u0085three"}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
    records, skipped = split(list(LlavaJson(path=path, images=tmp_path).records()))
    assert records[0].texts[0].turns[0].content == entry["caption"]
    assert not skipped


def test_empty_texts_and_images_elsewhere_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(0))
    entries = [
        {"image": "a.png", "caption": "  "},
        {"image": "../secret.png", "caption": "x"},
        {"image": str(tmp_path / "secret.png"), "caption": "x"},
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(entries))
    records, skipped = split(list(LlavaJson(path=path, images=tmp_path / "images").records()))
    assert not records
    assert [item.reason for item in skipped] == [
        "a text in it is empty",
        "its image '../secret.png' lies outside 'images'",
        f"its image '{tmp_path}/secret.png' lies outside 'images'",
    ]


def test_invalid_unicode_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text('[{"image": "a.png", "caption": "\\ud83d"}, {"image": "\\ud83d", "caption": "x"}]')
    records, skipped = split(list(LlavaJson(path=path, images=tmp_path).records()))
    assert not records
    assert len(skipped) == 2


def test_a_truncated_shard_loses_only_what_is_damaged(tmp_path: Path) -> None:
    samples = [{"__key__": f"{n}", "png": picture(n), "txt": b"words"} for n in range(6)]
    damaged = write_shard(tmp_path / "0.tar", samples[:4])
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    write_shard(tmp_path / "1.tar", samples[4:])
    records, skipped = split(list(WebDataset(path=f"{tmp_path}/*.tar").records()))
    names = [record.id for record in records]
    assert names[0] == "0.png"
    assert names[-2:] == ["4.png", "5.png"]
    assert any("damaged shard" in item.reason and item.place.endswith("0.tar") for item in skipped)
    assert all(record.read_image() == picture(int(record.id[0])) for record in records)


def test_pipes_pickles_and_missing_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such shard"):
        list(WebDataset(path=f"pipe:touch {tmp_path}/hacked").records())
    assert not (tmp_path / "hacked").exists()
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "png": picture(0), "pyd": b"cos\nsystem\n(S'x'\ntR."}])
    (record,) = WebDataset(path=f"{tmp_path}/0.tar").records()
    assert isinstance(record, Record)
    assert record.texts == ()
