"""Tables of pictures and texts: every usual form is read, and what is left out is named by file and row."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from conftest import CAPTIONS, ROOT, conversation, digest, picture, write_llava, write_shard
from test_extract import config, run

from fedcmp.cli import main
from fedcmp.extract.sources import parquet as module
from fedcmp.extract.sources.base import Skipped
from fedcmp.extract.sources.image_folder import ImageFolder
from fedcmp.extract.sources.llava_json import LlavaJson
from fedcmp.extract.sources.parquet import Parquet
from fedcmp.extract.sources.webdataset import WebDataset
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.records import Record, Turn

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PICTURES = [picture(seed, (9, 7)) for seed in range(6)]
PAIRS = [("user", "?"), ("assistant", "yes"), ("user", "Why?"), ("assistant", "So.")]
LLAVA = [{"from": "human" if role == "user" else "gpt", "value": text} for role, text in PAIRS]
CHAT = [{"role": role, "content": text} for role, text in PAIRS]


def write(path: Path, columns: dict[str, Any], rows: int = 2) -> Path:
    """A table, `rows` in a row group or batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".arrow":
        with pa.ipc.new_stream(str(path), table.schema) as stream:
            stream.write_table(table, max_chunksize=rows)
    else:
        pq.write_table(table, path, row_group_size=rows)
    return path


def inline(names: list[str | None], pictures: list[bytes | None] | None = None) -> pa.Array:
    contents = PICTURES if pictures is None else pictures
    return pa.array(
        [{"bytes": data, "path": name} for name, data in zip(names, contents, strict=False)], IMAGE
    )


def read(path: Path | str, **options: Any) -> tuple[list[Record], dict[str, str]]:
    """Records, and reasons by place without the folders before it; in this process, which is faster."""
    source = Parquet(path=str(path), **options)
    items = [item for item in source.records_here() if isinstance(item, Record | Skipped)]
    skipped = {item.place.rpartition("/")[2]: item.reason for item in items if isinstance(item, Skipped)}
    assert len(skipped) == sum(isinstance(item, Skipped) for item in items)
    return [item for item in items if isinstance(item, Record)], skipped


def said(record: Record) -> list[str]:
    return [text.turns[-1].content for text in record.texts]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "kind",
    [
        IMAGE,
        pa.struct([("bytes", pa.large_binary())]),
        pa.list_(IMAGE),
        pa.binary(),
        pa.large_binary(),
        pa.list_(pa.binary()),
        pa.string(),
        pa.list_(pa.large_string()),
        pa.struct([("path", pa.string())]),
    ],
    ids=str,
)
def test_pictures_of_every_form(tmp_path: Path, kind: pa.DataType, suffix: str) -> None:
    inner = kind.value_type if pa.types.is_list(kind) else kind
    cells: list[Any] = [{"bytes": data, "path": f"p{row}.png"} for row, data in enumerate(PICTURES)]
    for row, data in enumerate(PICTURES):
        (tmp_path / f"p{row}.png").write_bytes(data)
        if not pa.types.is_struct(inner):
            cells[row] = data if "binary" in str(inner) else f"p{row}.png"
        else:
            cells[row] = {field.name: cells[row][field.name] for field in inner}
    column = pa.array([[cell] for cell in cells] if inner is not kind else cells, kind)
    path = write(
        tmp_path / f"0.{suffix}", {"n": [1] * 6, "image": column, "caption": [f"c{n}" for n in range(6)]}
    )
    named = "binary" not in str(kind) or "path" in str(kind)
    options = {} if "binary" in str(kind) else {"images": tmp_path, "image": "image"}
    records, skipped = read(path, **options)
    assert [record.id for record in records] == [f"p{row}.png" if named else f"{row:09d}" for row in range(6)]
    assert [record.read_image() for record in records] == PICTURES
    assert [said(record) for record in records] == [[f"c{row}"] for row in range(6)]
    assert not skipped


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rows_are_the_same_here_and_apart(tmp_path: Path, suffix: str) -> None:
    columns = {"image": inline(["a", "b", "a", None], [*PICTURES[:2], PICTURES[0], None]), "text": ["x"] * 4}
    source = Parquet(path=str(write(tmp_path / f"0.{suffix}", columns)))
    items = list(source.records())
    assert items == [item for item in source.records_here() if isinstance(item, Record | Skipped)]
    assert [type(item) for item in items] == [Skipped, Record, Record, Skipped]
    assert source.size() == 4


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("column", "cell", "texts"),
    [
        ("text", " a caption ", [["a caption"]]),
        ("caption", "[a man] in {braces}", [["[a man] in {braces}"]]),
        ("captions", ["one", "", None, "two", "one"], [["one"], ["two"]]),
        ("conversations", LLAVA, [[text for _, text in PAIRS]]),
        ("messages", CHAT, [[text for _, text in PAIRS]]),
        ("conversations", json.dumps(LLAVA), [[text for _, text in PAIRS]]),
        ("text", json.dumps({"messages": CHAT}), [[text for _, text in PAIRS]]),
        ("texts", [{"user": "?", "assistant": "yes"}] * 2, [["?", "yes"] * 2]),
        (
            "messages",
            [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            ],
            [["<image>\n?", "yes"]],
        ),
    ],
)
def test_texts_of_every_form(
    tmp_path: Path, suffix: str, column: str, cell: Any, texts: list[list[str]]
) -> None:
    path = write(tmp_path / f"0.{suffix}", {"image": inline(["a.png"]), column: [cell], "id": ["x"]})
    (record,), skipped = read(path, split="test")
    assert [[turn.content for turn in text.turns] for text in record.texts] == texts
    assert {text.split for text in record.texts} == {"test"}
    roles = [turn.role for text in record.texts for turn in text.turns]
    assert roles == [
        role for text in texts for role, _ in zip(("user", "assistant") * 2, text, strict=False)
    ] or (set(roles) == {"assistant"})
    system = {path.name: "1 system messages, whose place the LLM's template takes"}
    assert skipped == (system if "system" in str(cell) else {})


def test_the_same_picture_is_one_record(tmp_path: Path) -> None:
    a, b, c = PICTURES[:3]
    names = ["a.png", "a.png", "b.png", "a.png", None, None, None, "same", "same", "b.png"]
    pictures: list[bytes | None] = [a, a, b, a, c, c, a, a, b, b]
    texts = ["1", "2", "3", "4", "5", "6", "7", "8", "9", "3"]
    write(tmp_path / "0.parquet", {"image": inline(names, pictures), "text": texts}, rows=3)
    write(tmp_path / "1.parquet", {"image": inline(["a.png", "b.png"], [a, c]), "text": ["10", "11"]})
    records, skipped = read(tmp_path)
    assert {record.id: said(record) for record in records} == {
        "a.png": ["1", "2", "4", "10"],
        "b.png": ["3"],
        "000000004": ["5", "6"],
        "000000006": ["7"],
        "same": ["8"],
        "000000008/same": ["9"],
        "1/b.png": ["11"],
    }
    assert [record.read_image() for record in records] == [a, b, c, a, a, b, c]
    assert skipped == {"0.parquet[9]": "the same text about the same picture came before"}
    assert Parquet(path=str(tmp_path)).size() == 12


def test_paths_are_one_picture_wherever_they_stand(tmp_path: Path) -> None:
    for row in range(3):
        (tmp_path / f"{row}.png").write_bytes(PICTURES[row])
    paths = ["0.png", "./1.png", "x/../0.png", str(tmp_path / "1.png"), "../secret.png", "2.png", None]
    path = write(tmp_path / "t.parquet", {"image": paths, "caption": [f"c{row}" for row in range(7)]})
    with pytest.raises(UserError, match="'image' holds paths of pictures; set 'images'"):
        list(Parquet(path=str(path)).records())
    records, skipped = read(path, images=tmp_path)
    assert {record.id: said(record) for record in records} == {
        "0.png": ["c0", "c2"], "1.png": ["c1", "c3"], "2.png": ["c5"]
    }  # fmt: skip
    assert skipped == {
        "t.parquet[4]": "cannot be read: its image '../secret.png' lies outside 'images'",
        "t.parquet[6]": "cannot be read: there is no image in it",
    }
    source = Parquet(path=str(path), images=tmp_path)
    before = source.identity()
    assert source.identity() == before
    (tmp_path / "1.png").write_bytes(PICTURES[4] + b" ")
    assert source.identity() != before


def test_ids_name_pictures(tmp_path: Path) -> None:
    columns = {"image": inline([None] * 3), "text": ["a", "b", "c"], "key": [7, 8, None]}
    path = write(tmp_path / "t.parquet", columns)
    assert [record.id for record in read(path, id="key")[0]] == ["7", "8", "000000002"]
    with pytest.raises(UserError, match=r"id = 'image' holds struct<.*>; expected strings or integers"):
        read(path, id="image")


def test_paths_from_elsewhere_name_nothing_outside(tmp_path: Path) -> None:
    names: list[str | None] = ["/home/me/a.png", "C:\\data\\b.png", "../c.png", "x/../d.png", "..", "e\n"]
    path = write(tmp_path / "t.parquet", {"image": inline(names), "text": ["words"] * 6})
    assert [record.id for record in read(path)[0]] == [
        "a.png", "b.png", "c.png", "d.png", "000000004", "000000005"
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, suffix: str) -> None:
    images = pa.array(
        [
            None,
            [],
            [None],
            [{"bytes": None, "path": None}],
            [{"bytes": b"", "path": None}],
            [{"bytes": PICTURES[0], "path": "0"}, {"bytes": PICTURES[1], "path": "1"}],
            [{"bytes": None, "path": "0.png"}],
            *[[{"bytes": PICTURES[row % 6], "path": f"{row}.png"}] for row in range(7, 16)],
        ],
        pa.list_(IMAGE),
    )
    turn = pa.list_(
        pa.struct([("role", pa.string()), ("content", pa.list_(pa.map_(pa.string(), pa.string())))])
    )
    whole = [{"role": "user", "content": []}, {"role": "assistant", "content": []}]
    bad: list[Any] = [
        None,
        [],
        [None],
        [{"role": "user", "content": None}],
        whole[:1],
        whole[::-1],
        whole,
        [{"role": "system", "content": []}],
        [{"role": "user", "content": [[("type", "video")]]}, whole[1]],
    ]
    path = write(
        tmp_path / f"t.{suffix}", {"images": images, "messages": pa.array([None] * 7 + bad, turn)}, rows=5
    )
    records, skipped = read(path)
    assert not records
    assert list(skipped) == [f"t.{suffix}[{row}]" for row in range(16)]
    reasons = [reason.removeprefix("cannot be read: ") for reason in skipped.values()]
    assert reasons[:5] == ["there is no image in it"] * 5
    assert reasons[5] == "it holds 2 images; one is read"
    assert "set 'images'" in reasons[6]
    assert reasons[7:10] == ["its text is empty"] * 3
    assert reasons[14] == "nothing but a system message is in it"
    assert all(
        "'messages'" in reason or "a text in it is empty" in reason
        for reason in [*reasons[10:14], reasons[15]]
    )


def test_strings_that_are_no_text_are_named(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b'[{"from": "human", "va', b"good too", b"  "])
    path = write(
        tmp_path / "t.parquet",
        {"image": inline([f"{row}.png" for row in range(5)]), "text": raw.view(pa.string())},
        rows=5,
    )
    stream = write(
        tmp_path / "t.arrow",
        {"image": inline([f"{row}.png" for row in range(5)]), "text": raw.view(pa.string())},
        rows=5,
    )
    for each in (path, stream):
        records, skipped = read(each)
        assert [said(record) for record in records] == [["good"], ["good too"]]
        assert [place.partition("[")[2] for place in skipped] == ["1]", "2]", "4]"]
        assert "UTF-8" in next(iter(skipped.values())).replace("utf-8", "UTF-8").replace("UTF8", "UTF-8")


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["x"]}, {}, "no column of pictures among text; set 'image'"),
        ({"image": [b"x"], "text": ["x"], "caption": ["x"]}, {}, "texts are in text, caption; set 'text'"),
        (
            {"left": inline([None]), "right": inline([None]), "text": ["x"]},
            {},
            "pictures are in left, right; set 'image'",
        ),
        (
            {"image": [b"x"], "text": ["x"]},
            {"text": "txt"},
            "text = 'txt': no such column; did you mean 'text'",
        ),
        ({"image": [b"x"], "text": [1.5]}, {"text": "text"}, "text = 'text' holds double; expected captions"),
        (
            {"image": [3], "text": ["x"]},
            {"image": "image"},
            "image = 'image' holds int64; expected encoded files",
        ),
        ({"image": [[["x"]]], "text": ["x"]}, {"image": "image"}, "expected encoded files"),
        ({"image": [b"x"], "text": [[{"a": 1}]]}, {"text": "text"}, "expected captions"),
        ({"im\x1b[2Jage": [b"x"]}, {}, r"no column of pictures among im\\x1b\[2Jage"),
        ({"im\x1b[2Jage": [b"x"]}, {"image": "image"}, r"no such column; known: im\\x1b\[2Jage"),
    ],
)
def test_columns_that_do_not_fit_are_one_line(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        list(Parquet(path=str(write(tmp_path / "t.parquet", columns)), **options).records())


@pytest.mark.parametrize(
    ("columns", "asked"),
    [
        ({"chosen": ["good"], "rejected": ["bad"]}, ()),
        ({"question": ["Is it?"], "chosen": ["good"], "rejected": ["bad"]}, ("Is it?",)),
        (
            {
                "prompt": [[{"role": "user", "content": "Is it?"}]],
                "chosen": [[{"role": "assistant", "content": "good"}]],
                "rejected": [[{"role": "assistant", "content": "bad"}]],
            },
            ("Is it?",),
        ),
        (
            {
                "conversations": [[{"from": "human", "value": "Is it?"}]],
                "chosen": [{"from": "gpt", "value": "good"}],
                "rejected": [{"from": "gpt", "value": "bad"}],
            },
            ("Is it?",),
        ),
    ],
    ids=["captions", "strings", "chats", "llava"],
)
def test_tables_of_preferences_are_read(tmp_path: Path, columns: dict, asked: tuple[str, ...]) -> None:
    records, skipped = read(write(tmp_path / "t.parquet", {"image": inline(["0.png"]), **columns}))
    assert bool(skipped) == (not asked)
    (text,) = records[0].texts
    assert (text.kind, text.rejected) == ("preference", "bad")
    assert [turn.content for turn in text.turns] == [*asked, "good"]


def test_half_a_preference_is_none(tmp_path: Path) -> None:
    columns = {"image": inline(["0.png"]), "chosen": ["good"], "caption": ["a cat"]}
    records, _ = read(write(tmp_path / "t.parquet", columns))
    assert [turn.content for turn in records[0].texts[0].turns] == ["a cat"]


def test_files_must_agree_on_columns(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", {"image": [PICTURES[0]], "caption": ["x"]})
    write(tmp_path / "1.parquet", {"image": [PICTURES[1]], "text": ["x"]})
    with pytest.raises(UserError, match=r"1\.parquet: it has pictures in image and texts in text, and"):
        list(Parquet(path=str(tmp_path)).records())


def hub(folder: Path, split: str, number: int, of: int) -> Path:
    name = f"{split}-{number:05d}-of-{of:05d}.parquet"
    seed = (split == "test") * 3 + number
    return write(
        folder / name, {"image": inline([f"{split}{number}.png"], [PICTURES[seed]]), "text": ["words"]}
    )


def test_paths_of_every_form(tmp_path: Path) -> None:
    train = [hub(tmp_path / "hub", "train", number, 2) for number in range(2)]
    names = ["train0.png", "train1.png"]
    (tmp_path / "hub/README.md").write_text("read me")
    for path in (
        tmp_path / "hub",
        f"{tmp_path}/hub/train-*.parquet",
        f"{tmp_path}/hub/train-{{00000..00001}}-of-00002.parquet",
        f"file://{tmp_path}/hub",
        f"file://{tmp_path}/hub/*.parquet",
    ):
        records, skipped = read(path)
        assert [record.id for record in records] == names
        assert not skipped
    assert [record.id for record in read(train[1])[0]] == names[1:]
    hub(tmp_path / "hub", "test", 0, 1)
    with pytest.raises(UserError, match=r"it holds test, train; set 'path' to one of them, as '.*/test-\*"):
        read(tmp_path / "hub")
    shutil.rmtree(tmp_path / "hub")
    hub(tmp_path / "hub", "train", 1, 3)
    with pytest.raises(
        UserError, match=r"1 of 3 files train-\*-of-00003.parquet are there; fetch the others"
    ):
        read(tmp_path / "hub")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.parquet file in it"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="no such shard"):
        read(tmp_path / "none.parquet")


def saved(folder: Path, names: list[str]) -> Path:
    """A folder as `Dataset.save_to_disk` writes it."""
    for row, name in enumerate(names):
        image = inline([f"{row}.png"], [PICTURES[row]])
        write(folder / name, {"image": image, "caption": [f"c{row}"]})
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_saved_folders_are_read_in_their_order(tmp_path: Path) -> None:
    folder = saved(tmp_path / "all/test", ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"])
    for path in (folder, f"file://{folder}"):
        assert [record.id for record in read(path)[0]] == ["0.png", "1.png"]
    assert Parquet(path=str(folder)).size() == 2
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(UserError, match=r"several splits; set 'path' to one of them, such as '.*/all/test'"):
        read(tmp_path / "all")
    for state in ("{", "[]", '{"_data_files": []}', '{"_data_files": [{"filename": "../../x.arrow"}]}'):
        (folder / "state.json").write_text(state)
        with pytest.raises(UserError, match="not as 'datasets' writes it"):
            read(folder)


def test_datasets_own_files_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for row, data in enumerate(PICTURES):
        (tmp_path / f"{row}.png").write_bytes(data)
    whole = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / f"{row}.png") for row in range(6)], "conversations": [LLAVA] * 6}
    ).cast_column("image", datasets.Image())
    datasets.disable_progress_bars()
    whole.to_parquet(tmp_path / "out/0.parquet")
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "dict")
    for path in (tmp_path / "out", tmp_path / "dict/train"):
        records, skipped = read(path, images=tmp_path)
        assert [record.id for record in records] == [f"{row}.png" for row in range(6)]
        assert [record.read_image() for record in records] == PICTURES
        assert [turn.content for turn in records[0].texts[0].turns] == [text for _, text in PAIRS]
        assert not skipped
    with pytest.raises(UserError, match="several splits"):
        read(tmp_path / "dict")


def test_damage_costs_no_more_than_it_has_to(tmp_path: Path) -> None:
    columns = {"image": inline([f"{row}.png" for row in range(6)]), "text": [f"c{row}" for row in range(6)]}
    write(tmp_path / "0.parquet", columns)
    path = write(tmp_path / "1.parquet", columns)
    group = pq.read_metadata(path).row_group(1)
    image = next(group.column(n) for n in range(3) if group.column(n).path_in_schema == "image.bytes")
    data = bytearray(path.read_bytes())
    data[image.dictionary_page_offset : image.dictionary_page_offset + 16] = b"\xff" * 16
    path.write_bytes(data)
    (tmp_path / "2.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "3.parquet").write_bytes(b"neither Parquet nor anything else" * 9)
    (tmp_path / "4.parquet").write_bytes(b"")
    records, skipped = read(tmp_path)
    assert [record.id for record in records] == [f"{row}.png" for row in range(6)]
    assert skipped.pop("1.parquet[2-3]").startswith("damaged: ")
    assert sorted(skipped) == [
        *["1.parquet[0]", "1.parquet[1]"], *["1.parquet[4]", "1.parquet[5]"],
        "2.parquet", "3.parquet", "4.parquet",
    ]  # fmt: skip


def test_a_stream_cut_short_gives_what_came_before(tmp_path: Path) -> None:
    columns = {"image": inline([f"{row}.png" for row in range(6)]), "text": [f"c{row}" for row in range(6)]}
    path = write(tmp_path / "0.arrow", columns)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    records, skipped = read(path)
    assert [record.id for record in records] == [f"{row}.png" for row in range(len(records))]
    assert 0 < len(records) < 6
    assert list(skipped) == [f"0.arrow[{len(records)}-]"]


def test_offsets_that_lead_out_of_a_batch_cost_their_rows(tmp_path: Path) -> None:
    columns = {"image": inline(["a", "b", "c"]), "text": ["first!", "second", "third!"]}
    path = write(tmp_path / "0.arrow", columns, rows=3)
    data = bytearray(path.read_bytes())
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 6, 12, 18))
    at = data.index(offsets)
    data[at + 12 : at + 16] = (2**31 - 1).to_bytes(4, "little")
    path.write_bytes(data)
    records, skipped = read(path)
    assert [said(record) for record in records] == [["first!"], ["second"]]
    assert list(skipped) == ["0.arrow[2]"]


@pytest.mark.parametrize(
    ("codec", "message"), [("zstd", "damaged: it claims 1125899906842"), ("lz4", "damaged: ")]
)
def test_what_claims_to_be_huge_is_damage(tmp_path: Path, codec: str, message: str) -> None:
    table = pa.table({"image": inline(["a"]), "text": ["words " * 99]})
    path = tmp_path / "0.arrow"
    options = pa.ipc.IpcWriteOptions(compression=codec)
    with pa.ipc.new_stream(str(path), table.schema, options=options) as stream:
        stream.write_table(table)
    data = path.read_bytes()
    claimed = (6 * 99).to_bytes(8, "little")
    assert data.count(claimed)
    path.write_bytes(data.replace(claimed, (2**50).to_bytes(8, "little")))
    records, skipped = read(path)
    assert not records
    assert skipped["0.arrow[0-]"].startswith(message)


def test_bombs_are_not_read(tmp_path: Path) -> None:
    bomb = pa.array([{"bytes": bytes(100 << 20), "path": "a"}], IMAGE)
    path = tmp_path / "0.parquet"
    pq.write_table(pa.table({"image": bomb, "text": ["x"]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 1 << 20
    records, skipped = read(path)
    assert not records
    assert "no pictures do that" in skipped["0.parquet[0-0]"]


def test_a_crash_is_put_down_to_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashing(path: object, function: object, source: object) -> Iterator[object]:
        for shard in ("0.parquet", "1.parquet"):
            yield module._Reading(shard)
        raise UserError(f"{path}: damaged, as reading it crashes")

    monkeypatch.setattr(module, "apart", crashing)
    with pytest.raises(UserError, match=r"^1\.parquet: damaged"):
        list(Parquet(path="*.parquet").records())


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "0.parquet", {"image": inline(["a"]), "text": ["x"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install 'fedcmp\[parquet\]'"):
        list(Parquet(path=str(path)).records_here())


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str) -> None:
    """160 MB in row groups of 4 MB, or in batches, which are mapped."""
    noise = [os.urandom(1 << 18) for _ in range(64)]
    cells = [{"bytes": noise[row % 64] + bytes([row // 64]), "path": f"{row}"} for row in range(640)]
    path = write(
        tmp_path / f"0.{suffix}", {"image": pa.array(cells, IMAGE), "text": ["words"] * 640}, rows=16
    )
    code = (
        "import sys\n"
        "from fedcmp.extract.sources.parquet import Parquet\n"
        "def now(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) >> 10\n"
        "source = Parquet(path=sys.argv[1])\n"
        "next(iter(source.records_here())); start, most, number = now(), 0, 0\n"
        "for number, _ in enumerate(source.records_here()): most = max(most, now())\n"
        "print(number, most - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    number, grown = map(int, done.stdout.split())
    assert number >= 640
    assert grown < 112


def test_extract_makes_what_it_makes_of_files(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    data = tmp_path / "data"
    write_llava(data, 11)
    (data / "scans/004.png").write_bytes(b"no picture")
    entries = [conversation(seed) for seed in range(11)]
    entries.append({"image": "scans/002.png", "conversations": LLAVA[:2]})
    (data / "pairs.json").write_text(json.dumps(entries))
    files = [(data / entry["image"]).read_bytes() for entry in entries]
    columns = {
        "image": inline([entry["image"] for entry in entries], files),  # type: ignore[arg-type]
        "conversations": [entry["conversations"] for entry in entries],
    }
    write(tmp_path / "t/0.parquet", columns, rows=4)
    sources = {
        "files": f'{{ name = "llava_json", path = "{data}/pairs.json", images = "{data}" }}',
        "table": f'{{ name = "parquet", path = "{tmp_path}/t" }}',
    }
    caches = {}
    for name, source in sources.items():
        (tmp_path / name).mkdir()
        path = config(tmp_path / name, clip_dir, llama_dir, source)
        result = run(path)
        assert result.exit_code == 0, result.output
        caches[name] = FeatureCache(tmp_path / name / "features/one.zarr")
    one, two = caches.values()
    assert one.ids == two.ids
    assert (one.read(range(11)) == two.read(range(11))).all()
    assert [one.text(n) for n in range(one.texts)] == [two.text(n) for n in range(two.texts)]
    assert [item["id"] for item in two.manifest["failures"]] == ["scans/004.png"]
    assert "Nothing to do" in run(path).output
    whole = digest(tmp_path / "table/features")
    shutil.rmtree(tmp_path / "table/features")
    for worker in ("1/2", "0/2"):
        assert run(path, "--worker", worker).exit_code == 0
    assert digest(tmp_path / "table/features") == whole
    write(tmp_path / "t/0.parquet", {**columns, "n": [1] * 12})
    assert "encoding again" in run(path).output


def test_a_table_with_nothing_usable_is_one_line(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(b"PAR1" * 9)
    result = run(
        config(tmp_path, clip_dir, llama_dir, f'{{ name = "parquet", path = "{tmp_path}/0.parquet" }}')
    )
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert "not one image could be read; first," in output
    assert "0.parquet: damaged" in output


def test_partition_writes_the_pictures(tmp_path: Path, clip_dir: Path, llama_dir: Path) -> None:
    names = [f"site{row % 2}/{row}.png" for row in range(6)]
    columns = {
        "image": inline([*names, "site0/0.png"], [*PICTURES, PICTURES[0]]),
        "caption": [*CAPTIONS, "a", "b", "c"],
    }
    write(tmp_path / "0.parquet", columns)
    source = tmp_path / "source.toml"
    source.write_text(f'name = "parquet"\npath = "{tmp_path}/0.parquet"\n')
    words = ["partition", str(source), "--out", str(tmp_path / "out"), "--by", "field", "--component", "0"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "Pass --write-images" in result.output
    assert not (tmp_path / "out/images").exists()
    result = CliRunner().invoke(main, [*words, "--write-images"])
    assert result.exit_code == 0, result.output
    written = {
        str(file.relative_to(tmp_path / "out/images")): file for file in (tmp_path / "out").rglob("*.png")
    }
    assert {name: file.read_bytes() for name, file in written.items()} == dict(
        zip(names, PICTURES, strict=True)
    )
    times = {name: file.stat().st_mtime_ns for name, file in written.items()}
    snippet = result.output[result.output.index("site0 = ") :].splitlines()[0].partition(" = ")[2]
    (tmp_path / "made").mkdir()
    made = run(config(tmp_path / "made", clip_dir, llama_dir, snippet))
    assert made.exit_code == 0, made.output
    cache = FeatureCache(tmp_path / "made/features/one.zarr")
    assert list(cache.ids) == names[::2]
    assert cache.texts == 4
    written[names[0]].write_bytes(b"torn")
    assert CliRunner().invoke(main, [*words, "--write-images"]).exit_code == 0
    assert written[names[0]].read_bytes() == PICTURES[0]
    assert all(written[name].stat().st_mtime_ns == times[name] for name in names[1:])
    refused = CliRunner().invoke(main, [*words, "--write-images", "--images", "x"])
    assert refused.exit_code == 2
    assert "both say where images are" in refused.output


def test_partition_goes_by_a_column(tmp_path: Path) -> None:
    columns = {
        "image": inline([None] * 6, [*PICTURES[:5], PICTURES[4]]),
        "caption": ["a", "b", "c", "d", "e", "f"],
        "hospital": ["north", "south", None, "north", "south", "north"],
        "ward": [1, 1, 2, 2, 1, 1],
        "weight": [0.5] * 6,
    }
    write(tmp_path / "0.parquet", columns)
    source = tmp_path / "source.toml"
    source.write_text(f'name = "parquet"\npath = "{tmp_path}/0.parquet"\n')

    def split(field: str, *more: str) -> Result:
        words = ["partition", str(source), "--out", str(tmp_path / field), "--by", "field", "--field", field]
        return CliRunner().invoke(main, [*words, *more])

    def silos(field: str) -> dict[str, list[str]]:
        return {
            file.stem: [json.loads(line)["caption"] for line in file.read_text().splitlines()]
            for file in sorted((tmp_path / field).glob("*.jsonl"))
        }

    result = split("hospital")
    assert result.exit_code == 0, result.output
    assert silos("hospital") == {"north": ["a", "d"], "south": ["b", "e", "f"]}
    assert "skipped 000000002: it has no 'hospital'" in result.output
    assert "1 images have texts of different labels" in result.output
    assert split("ward").exit_code == 0
    assert silos("ward") == {"1": ["a", "b", "e", "f"], "2": ["c", "d"]}
    for field, message in (
        ("weight", "expected strings or integers"),
        ("hospitl", "did you mean 'hospital'"),
    ):
        refused = split(field)
        assert refused.exit_code == 2
        assert message in " ".join(refused.output.split())


def test_partition_refuses_names_that_cannot_be_files(tmp_path: Path) -> None:
    columns = {"image": inline([None] * 3), "caption": ["a", "b", "c"], "key": ["x", "x/y", "../z"]}
    write(tmp_path / "0.parquet", columns)
    source = tmp_path / "source.toml"
    source.write_text(f'name = "parquet"\npath = "{tmp_path}/0.parquet"\nid = "key"\n')
    words = ["partition", str(source), "--out", str(tmp_path / "out"), "--by", "hash", "--silos", "1"]
    result = CliRunner().invoke(main, [*words, "--write-images"])
    assert result.exit_code == 2
    assert "another picture's name is its folder" in " ".join(result.output.split())
    assert "skipped ../z: its name cannot be that of an image" in CliRunner().invoke(main, words).output


def test_chats_are_read_from_files_too(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": "a.png", "messages": CHAT}]))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "messages": CHAT}))
    write_shard(tmp_path / "0.tar", [{"__key__": "a", "png": PICTURES[0], "json": json.dumps(CHAT).encode()}])
    for source in (
        LlavaJson(path=tmp_path / "pairs.json", images=tmp_path),
        ImageFolder(path=tmp_path, captions=tmp_path / "pairs.jsonl"),
        WebDataset(path=f"{tmp_path}/0.tar"),
    ):
        (record,) = source.records()
        assert isinstance(record, Record)
        assert record.texts[0].turns == tuple(Turn(role, text) for role, text in PAIRS)  # type: ignore[arg-type]
