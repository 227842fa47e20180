"""LLaVA's JSON, one entry in memory at a time: it must be what reading all of it would be."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedcmp.extract.sources.base import (
    Pair,
    Skipped,
    by_image,
    hash_file,
    image_name,
    image_names,
    json_lines,
    read_lines,
    stat_images,
    text_of,
)
from fedcmp.extract.sources.json_entries import list_entries
from fedcmp.extract.sources.llava_json import LlavaJson
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint, fingerprint_all
from fedcmp.pipeline.records import Record
from fedcmp.pipeline.remote import Remote

BOM = b"\xef\xbb\xbf"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
CHUNKS = st.integers(1, 60)


class Counting(io.BytesIO):
    """A file that knows how much of it was read, and in how many pieces."""

    taken = pieces = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken, self.pieces = self.taken + len(data), self.pieces + 1
        return data


def read_all(data: bytes, chunk: int) -> list[Any]:
    return [entry for _, entry in list_entries(io.BytesIO(data), "f", chunk)]


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES), CHUNKS, st.booleans(), st.sampled_from([None, 0, 3]), st.sampled_from([b"", BOM]))
@example([1.5e-300, -float("inf"), 10**40], 1, True, None, b"")
def test_a_list_is_read_as_json_reads_it(
    entries: list[Any], chunk: int, ascii_: bool, indent: int | None, mark: bytes
) -> None:
    text = json.dumps(entries, ensure_ascii=ascii_, indent=indent)
    data = mark + f" \n{text}\t\r\n".encode("utf-8", "replace")
    whole = json.loads(data.decode("utf-8-sig"))
    found = list(list_entries(io.BytesIO(data), "f", chunk))
    assert [entry for _, entry in found] == whole
    for byte, entry in found:
        assert json.JSONDecoder().raw_decode(data[byte:].decode())[0] == entry


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(VALUES, max_size=4), CHUNKS)
def test_damage_is_found_where_json_finds_it(data: st.DataObject, entries: list[Any], chunk: int) -> None:
    text = json.dumps(entries, ensure_ascii=False).encode("utf-8", "replace").decode()
    place = data.draw(st.integers(0, len(text)))
    text = text[:place] + data.draw(st.text('[]{}",:\\ \n0e+.-tnI\x01ü', max_size=3)) + text[place:]
    text = text[: data.draw(st.integers(0, len(text)))] if data.draw(st.booleans()) else text
    try:
        whole = json.loads(text)
        why = None if isinstance(whole, list) else "expected a list of entries"
    except ValueError as error:
        why = f"not valid JSON: .*{str(error).partition(': ')[2]}".replace("(", r"\(").replace(")", r"\)")
        # Since 3.13 json names the comma, and not what follows it.
        why = "not valid JSON: " if "trailing comma" in str(error) else why
    if why is None:
        assert read_all(text.encode(), chunk) == whole
    else:
        with pytest.raises(UserError, match=why):
            read_all(text.encode(), chunk)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"not valid JSON: Expecting value: line 1 column 1 \(char 0\)"),
        (b"[1,]", r"Expecting value: line 1 column 4"),
        (b"[1 2]", r"Expecting ',' delimiter: line 1 column 4"),
        (b"[1]\n\n  x", r"Extra data: line 3 column 3 \(char 7\)"),
        (b'{"a": 1}\n{"a": 2}', r"Extra data: line 2 column 1"),
        (b' "text" ', "expected a list of entries, found str"),
        (b'["\xc3\xbc", "\xff"]', r"not UTF-8 \(byte 8: invalid start byte\); convert it first"),
        (b'["\xc3', r"not UTF-8 \(byte 2: unexpected end of data\)"),
        ('["x"]'.encode("utf-16"), "not UTF-8"),
        (b"[1,\n" + b"[" * 10**6, "not valid JSON: .*recursion.* line 2 column 1"),
        (b"[" + b"7" * 5000 + b"]", "not valid JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
def test_an_error_names_its_place(data: bytes, message: str, chunk: int) -> None:
    with pytest.raises(UserError, match=f"^f: .*{message}"):
        read_all(data, chunk)


def test_a_number_may_go_on_after_what_was_read() -> None:
    many = "7" * 5000
    for number in (f"{many}.5", f"{many}e-4990", "-Infinity", "-1.5E+10"):
        for chunk in range(1, 40):
            assert read_all(f"[{number}, [{number}]]".encode(), chunk) == [float(number), [float(number)]]


def test_damage_ends_the_reading_and_a_large_entry_is_tried_a_few_times() -> None:
    broken = Counting(b'[{"image" "a.png"}, ' + b'{"image": "a.png"},\n' * 10**5)
    with pytest.raises(UserError, match="Expecting ':' delimiter"):
        list(list_entries(broken, "f", 1000))
    assert broken.taken < 5000
    large = Counting(json.dumps(["x" * 10**6, 1]).encode())
    assert [entry for _, entry in list_entries(large, "f", 1000)] == ["x" * 10**6, 1]
    assert large.pieces < 20


def by_reading_all(source: LlavaJson) -> tuple[list[Record | Skipped], dict[str, Any], int]:
    """Records, identity and size by having all entries in memory."""
    text = read_lines(source.path, "path")
    if source.path.suffix == ".jsonl":
        entries = list(json_lines(source.path, text))
    else:
        entries = [(f"{source.path}[{n}]", entry) for n, entry in enumerate(json.loads(text))]

    def pairs() -> Iterator[Pair | Skipped]:
        for place, entry in entries:
            if isinstance(entry, Skipped):
                yield entry
                continue
            try:
                image = entry.get("image") if isinstance(entry, dict) else None
                named = image_name(image, "images", source.images)
                yield Pair(place, named, text_of(entry, source.split), entry)
            except ValueError as error:
                yield Skipped(place, str(error))

    named = [entry.get("image") for _, entry in entries if isinstance(entry, dict)]
    names = image_names(named, "images", source.images)
    identity = {
        "name": "llava_json",
        "split": source.split,
        "texts": hash_file(source.path, "path"),
        "images": stat_images(source.images, names),
    }
    return list(by_image(pairs(), source.images)), identity, len(names)


IMAGES = st.sampled_from(
    ["a.png", "b.png", "./a.png", ["c.png"], ["a", "b"], "ü.png", "../a.png", "", None, 3]
)
SAID = st.sampled_from(["one", "two", "ü😀\u2028", " ", "\ud83d", 7])
ENTRIES = (
    st.fixed_dictionaries({"image": IMAGES, "caption": SAID})
    | st.builds(
        lambda image, asked, said: {
            "image": image,
            "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": said}],
        },
        IMAGES,
        SAID,
        SAID,
    )
    | VALUES
)
LINES = st.sampled_from(["", "  ", "\xa0", "{broken", "null", '{"image": "a.png"}  x'])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([b"", BOM]))
def test_a_source_gives_what_reading_all_of_it_would(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, lines: bool, mark: bytes
) -> None:
    folder = tmp_path_factory.mktemp("d", numbered=True)
    (folder / "a.png").write_bytes(b"a")
    entries = data.draw(st.lists(ENTRIES, max_size=12))
    if lines:
        written = [*map(json.dumps, entries), *data.draw(st.lists(LINES, max_size=3))]
        text = data.draw(st.sampled_from(["\n", "\r\n"])).join(data.draw(st.permutations(written)))
    else:
        text = json.dumps(entries)
    path = folder / ("pairs.jsonl" if lines else "pairs.json")
    path.write_bytes(mark + text.encode())
    source = LlavaJson(path=path, images=folder)
    records, identity, size = by_reading_all(source)
    assert list(source.records()) == records
    assert source.identity() == identity
    assert source.size() == size
    once = [pair for pair in source.pairs() if isinstance(pair, Pair)]
    assert sorted({pair.image for pair in once}) == sorted(r.id for r in records if isinstance(r, Record))


def test_entries_of_an_image_may_stand_anywhere(tmp_path: Path) -> None:
    """Their texts stay in their order, and images in that of their first text that can be used."""
    entries = [{"image": f"{n % 7}.png", "caption": f"text {n // 14}"} for n in range(70)]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"image": "3.png", "caption": ""}, *entries]))
    found = list(LlavaJson(path=path, images=tmp_path).records())
    records = [item for item in found if isinstance(item, Record)]
    assert [record.id for record in records] == [f"{n}.png" for n in range(7)]
    for record in records:
        assert [text.turns[0].content for text in record.texts] == [f"text {n}" for n in range(5)]
    assert len(found) - len(records) == 1 + 35
    assert [item.place for item in found[:2] if isinstance(item, Skipped)] == [f"{path}[0]", f"{path}[8]"]


MEASURE = """
    import sys, tracemalloc
    from pathlib import Path
    from fedcmp.extract.sources.llava_json import LlavaJson
    from fedcmp.pipeline.records import Record

    path, number = Path(sys.argv[1]), int(sys.argv[2])
    tracemalloc.start()
    source = LlavaJson(path=path, images=path.parent)
    assert source.size() == number // 2
    scanned = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    assert sum(len(item.texts) for item in source.records() if isinstance(item, Record)) == number
    print(scanned, tracemalloc.get_traced_memory()[1])
"""


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_memory_is_a_few_bytes_an_entry(tmp_path: Path, suffix: str) -> None:
    number = 40_000
    path = tmp_path / f"pairs.{suffix}"
    images = (f"folder/{n * 7919 % (number // 2)}.jpg" for n in range(number))
    lines = (json.dumps({"image": image, "caption": f"{n}" * 200}) for n, image in enumerate(images))
    start, between, end = ("[", ",", "]") if suffix == "json" else ("", "\n", "")
    path.write_text(start + between.join(lines) + end)
    # A process of its own: threads of other tests take memory, too.
    command = [sys.executable, "-c", textwrap.dedent(MEASURE), str(path), str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scanned, read = map(int, done.stdout.split())
    # Beside a chunk and the interpreter's own; in Python's words an entry takes 1500 bytes.
    assert scanned < 90 * number + 8e6
    assert read < 25 * number + 6e6


def test_a_file_that_is_written_to_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({"image": f"{n}.png", "caption": "x"}) + "\n" for n in range(4)]
    path.write_text("".join(lines))
    source = LlavaJson(path=path, images=tmp_path)
    records = source.records()
    assert next(records).id == "0.png"  # type: ignore[union-attr]
    other = tmp_path / "other"
    other.write_text("".join(lines[2:]))
    other.replace(path)
    assert len(list(records)) == 3
    assert source.size() == 2
    records = source.records()
    next(records)
    with path.open("a") as file:
        file.write(lines[0])
    assert source.size() == 3
    with pytest.raises(UserError, match=r"pairs.jsonl: it was written to while it was read; run again"):
        next(records)


def test_what_lies_behind_a_url_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"image": "a.png", "caption": word} for word in ("one", "two")]))
    there = Remote("memory://silo/pairs.json")
    there.send(path)
    opened = []
    monkeypatch.setattr(Remote, "open", lambda self, open_=Remote.open: opened.append(self) or open_(self))
    source, local = LlavaJson(path=there, images=tmp_path), LlavaJson(path=path, images=tmp_path)
    assert source.identity() == local.identity()
    assert list(source.records()) == list(source.records()) == list(local.records())
    assert source.size() == 1
    assert opened == [there]


def test_no_room_for_a_copy_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "pairs.json").write_text("[]")
    there = Remote("memory://silo/full.json")
    there.send(tmp_path / "pairs.json")
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(UserError, match=r"full.json: no copy in .*: .*No space left.*; set TMPDIR"):
        LlavaJson(path=there, images=tmp_path).size()


@given(st.lists(VALUES))
def test_a_fingerprint_of_many_values_is_that_of_their_list(values: list[Any]) -> None:
    values = [value for value in values if not any(each in repr(value) for each in ("inf", "\\ud"))]
    assert fingerprint_all(values) == fingerprint(values)
