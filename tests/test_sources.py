from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import CAPTIONS, conversation, picture, write_llava, write_shard
from PIL import Image

from fedcmp.extract.sources.base import Skipped
from fedcmp.extract.sources.hdf5 import Hdf5
from fedcmp.extract.sources.image_folder import ImageFolder
from fedcmp.extract.sources.llava_json import LlavaJson
from fedcmp.extract.sources.webdataset import WebDataset
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.records import Record, Text, Turn


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
        ("[7]", "neither 'conversations', 'messages' nor 'caption' is in it"),
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


def test_webdataset_takes_many_texts_and_many_turns(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dog."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Brown."},
    ]
    several = [{"conversations": turns}, {"caption": "a dog"}, "ein Hund", "ein Hund"]
    samples = [
        {"__key__": "a", "png": picture(0), "json": json.dumps(turns).encode()},
        {"__key__": "b", "png": picture(1), "json": json.dumps(several).encode()},
        {"__key__": "c", "png": picture(2), "json": b"[" * 100_000},
    ]
    write_shard(tmp_path / "0.tar", samples)
    records, skipped = split(list(WebDataset(path=f"{tmp_path}/0.tar").records()))
    assert [[len(text.turns) for text in record.texts] for record in records] == [[4], [4, 1, 1]]
    assert [item.place.split(":")[-1] for item in skipped] == ["c"]


@pytest.mark.parametrize("address", ["pipe:touch {}/hacked", "pipe://touch {}/hacked"])
def test_no_shell_is_ever_run(tmp_path: Path, address: str) -> None:
    with pytest.raises(UserError):
        list(WebDataset(path=address.format(tmp_path)).records())
    assert not (tmp_path / "hacked").exists()
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "png": picture(0), "txt": b"words"}])
    assert len(list(WebDataset(path=f"{tmp_path}/0.tar").records())) == 1


def folder_of(path: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(picture(seed, form="jpeg" if name.endswith("jpg") else "png"))
    return path


def test_image_folder_with_texts_beside_the_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["b/2.png", "a/1.jpg", "3.PNG", "b/4.png"])
    (folder / "a/1.txt").write_text("\ufeffZwei Hunde\n", encoding="utf-8")
    (folder / "b/2.txt").write_bytes(b"\xff\xfe")
    (folder / "b/4.txt").write_text("  ")
    source = ImageFolder(path=folder)
    records, skipped = split(list(source.records()))
    assert [record.id for record in records] == ["3.PNG", "a/1.jpg"]
    assert [len(record.texts) for record in records] == [0, 1]
    assert records[1].texts[0].turns[0].content == "Zwei Hunde"
    assert records[1].read_image() == picture(1, form="jpeg")
    assert [Path(item.place).name for item in skipped] == ["2.txt", "4.txt"]
    assert source.size() == 4
    before = source.identity()
    assert ImageFolder(path=folder).identity() == before
    (folder / "a/1.txt").write_text("Drei Hunde")
    assert ImageFolder(path=folder).identity() != before


@pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("tsv", "\t")])
def test_image_folder_with_a_table(tmp_path: Path, suffix: str, comma: str) -> None:
    folder = folder_of(tmp_path / "images", ["1.png", "2.png"])
    table = tmp_path / f"captions.{suffix}"
    rows = [
        ("note", "file", "words"),
        ("x", "2.png", '"a dog, \n""Rex"""'),
        ("x", "1.png", "ein Hund"),
        ("x", "2.png", "a cat"),
        ("x", "1.png", "ein Hund"),
        ("x", "../secret.png", "no"),
        ("x", "1.png", " "),
        ("x", "1.png"),
    ]
    table.write_text("\ufeff" + "\r\n".join(comma.join(row) for row in rows), encoding="utf-8", newline="")
    source = ImageFolder(path=folder, captions=table, image_column="file", text_column="words")
    records, skipped = split(list(source.records()))
    assert [record.id for record in records] == ["2.png", "1.png"]
    assert [text.turns[0].content for text in records[0].texts] == ['a dog, \n"Rex"', "a cat"]
    assert [item.reason for item in skipped] == [
        "the same text about '1.png' came before",
        "its image '../secret.png' lies outside 'path'",
        "a text in it is empty",
        "2 columns where the header has 3",
    ]
    assert source.size() == 2
    with pytest.raises(UserError, match=r"no column 'image'; known: file, note, words; set 'image_column'"):
        list(ImageFolder(path=folder, captions=table).records())


def test_image_folder_with_json_lines(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["scans/001.png"])
    path = tmp_path / "captions.jsonl"
    entries = [{"image": "scans/001.png", "caption": "words"}, conversation(1), {"image": "x.png"}, 3]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "{broken\n")
    records, skipped = split(list(ImageFolder(path=folder, captions=path).records()))
    assert [text.kind for text in records[0].texts] == ["caption", "conversation"]
    assert [item.place for item in skipped] == [f"{path}:{line}" for line in (3, 4, 5)]


def test_unusable_image_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(ImageFolder(path=tmp_path / "none").records())
    with pytest.raises(UserError, match="no picture"):
        list(ImageFolder(path=tmp_path).records())
    with pytest.raises(UserError, match="no such file; set 'captions'"):
        ImageFolder(path=tmp_path, captions=tmp_path / "none.csv").identity()
    (tmp_path / "captions.xlsx").write_text("x")
    with pytest.raises(UserError, match=r"expected a \.csv"):
        list(ImageFolder(path=tmp_path, captions=tmp_path / "captions.xlsx").records())


def hdf5_file(path: Path, form: str, number: int = 5) -> list[bytes]:
    pictures = [picture(seed, size=(9, 7)) for seed in range(number)]
    with h5py.File(path, "w") as file:
        if form == "variable":
            images = file.create_dataset("images", number, h5py.vlen_dtype(np.uint8))
            for row, data in enumerate(pictures):
                images[row] = np.frombuffer(data, np.uint8)
        elif form == "fixed":
            file["images"] = np.array(pictures)
        else:
            rgb = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
            file.create_dataset("images", data=np.stack(rgb), compression="gzip")
        file["captions"] = [f"Bild {row} ü" for row in range(number)]
        file["names/site"] = [f"p{row}.png" for row in range(number)]
        talk = json.dumps([{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}])
        file["talk"] = [talk] * (number - 1) + ["{broken"]
        file["several"] = np.array([[b"one", b"two"]] * (number - 1) + [[b"", b""]])
    return pictures


@pytest.mark.parametrize("form", ["variable", "fixed", "pixels"])
def test_hdf5_gives_every_row(tmp_path: Path, form: str) -> None:
    pictures = hdf5_file(tmp_path / "d.h5", form, 70)
    source = Hdf5(path=tmp_path / "d.h5", ids="names/site")
    records, skipped = split(list(source.records()))
    assert not skipped
    assert source.size() == len(records) == 70
    assert [record.id for record in records] == [f"p{row}.png" for row in range(70)]
    assert records[69].texts == (Text((Turn("assistant", "Bild 69 ü"),)),)
    for record, wanted in zip(records, pictures, strict=True):
        ours, theirs = (Image.open(io.BytesIO(data)) for data in (record.read_image(), wanted))
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_hdf5_conversations_and_several_captions(tmp_path: Path) -> None:
    hdf5_file(tmp_path / "d.h5", "variable")
    records, skipped = split(list(Hdf5(path=tmp_path / "d.h5", conversations="talk").records()))
    assert [record.texts[0].kind for record in records] == ["conversation"] * 4
    assert [item.place for item in skipped] == [f"{tmp_path}/d.h5[4]"]
    records, skipped = split(list(Hdf5(path=tmp_path / "d.h5", captions="several").records()))
    assert [len(record.texts) for record in records] == [2] * 4
    assert [record.id for record in records][:2] == ["000000000", "000000001"]
    assert "its caption is empty" in skipped[0].reason


def test_hdf5_reads_no_other_file(tmp_path: Path) -> None:
    hdf5_file(tmp_path / "secret.h5", "pixels")
    (tmp_path / "raw").write_bytes(bytes(5 * 7 * 9 * 3))
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["linked"] = h5py.ExternalLink("secret.h5", "images")
        layout = h5py.VirtualLayout((5, 7, 9, 3), np.uint8)
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "images", (5, 7, 9, 3))
        file.create_virtual_dataset("virtual", layout)
        storage = [(str(tmp_path / "raw"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("external", (5, 7, 9, 3), np.uint8, external=storage)
        file["soft"] = h5py.SoftLink("/virtual")
        file["numbers"] = np.zeros((5, 3))
    for name, message in (
        ("linked", "is a link"),
        ("soft", "is a link"),
        ("virtual", "other files"),
        ("external", "other files"),
        ("numbers", "expected encoded files"),
        ("virtul", "did you mean 'virtual'"),
    ):
        with pytest.raises(UserError, match=message):
            list(Hdf5(path=tmp_path / "d.h5", images=name).records())
    (tmp_path / "torn.h5").write_bytes((tmp_path / "secret.h5").read_bytes()[:500])
    with pytest.raises(UserError, match="not a whole HDF5 file"):
        list(Hdf5(path=tmp_path / "torn.h5").records())


def test_hdf5_datasets_go_together(tmp_path: Path) -> None:
    hdf5_file(tmp_path / "d.h5", "fixed")
    with h5py.File(tmp_path / "d.h5", "a") as file:
        file["short"] = ["a", "b"]
    with pytest.raises(UserError, match="has 2 rows, '/images' 5"):
        list(Hdf5(path=tmp_path / "d.h5", captions="short").records())
    with pytest.raises(UserError, match="not both"):
        list(Hdf5(path=tmp_path / "d.h5", captions="captions", conversations="talk").records())


def test_zero_bytes_at_the_end_of_a_fixed_string_are_kept(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "bmp")
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["images"] = np.array([buffer.getvalue(), picture(0, size=(2, 2))])
    records, _ = split(list(Hdf5(path=tmp_path / "d.h5").records()))
    assert Image.open(io.BytesIO(records[0].read_image())).convert("RGB").size == (4, 4)


def test_a_damaged_chunk_loses_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    rgb = np.random.default_rng(0).integers(0, 255, (40, 6, 6, 3), dtype=np.uint8)
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", data=rgb, chunks=(1, 6, 6, 3), fletcher32=True)
        at = images.id.get_chunk_info(33).byte_offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    records, skipped = split(list(Hdf5(path=path).records()))
    assert [record.id for record in records] == [f"{n:09d}" for n in range(40) if n != 33]
    assert [item.place for item in skipped] == [f"{path}[33]"]
    assert "damaged" in skipped[0].reason


def test_names_that_are_not_utf8_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))).write_bytes(picture(1))
    source = ImageFolder(path=tmp_path)
    records, skipped = split(list(source.records()))
    assert [record.id for record in records] == ["a.png"]
    assert [item.reason for item in skipped] == ["its name is not UTF-8"]
    json.dumps(skipped[0].place).encode()
    assert source.size() == 1
    assert source.identity()["names"] == ["a.png"]

    odd = b"caf\xe9".decode("utf-8", "surrogateescape")
    samples = [{"__key__": key, "png": picture(0), "txt": b"words"} for key in (odd, "b")]
    write_shard(tmp_path / "0.tar", samples)
    records, skipped = split(list(WebDataset(path=f"{tmp_path}/0.tar").records()))
    assert [record.id for record in records] == ["b.png"]
    assert "its name or text cannot be read" in skipped[0].reason
    skipped[0].place.encode()


def test_a_failing_disk_is_no_damaged_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it hides would be skipped for good."""
    shard = write_shard(tmp_path / "0.tar", [{"__key__": f"{n}", "png": picture(n)} for n in range(9)])

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > len(self.getvalue()) / 2:
                raise OSError(errno.ESTALE, "Stale file handle")
            return super().read(size)

    whole = shard.read_bytes()
    monkeypatch.setattr(Path, "open", lambda self, mode="r": Failing(whole))
    with pytest.raises(UserError, match=r"0.tar: cannot be read \(.*Stale file handle\); fix that and rerun"):
        list(WebDataset(path=str(shard)).records())
