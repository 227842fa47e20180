"""Whatever looks like a picture or a text becomes part of a record, or is listed."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, picture
from PIL import Image

from fedcmp.extract.sources.base import Skipped, image_name
from fedcmp.extract.sources.image_folder import ImageFolder
from fedcmp.extract.sources.llava_json import LlavaJson
from fedcmp.extract.sources.webdataset import WebDataset
from fedcmp.pipeline.records import Record

PNG = picture(0, (8, 6))


def tar(path: Path, *files: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(source: ImageFolder | LlavaJson | WebDataset) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Texts by image, and reasons by place without the folders before it."""
    records: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for item in source.records():
        if isinstance(item, Record):
            records[item.id] = [text.turns[-1].content for text in item.texts]
        else:
            assert isinstance(item, Skipped)
            skipped[item.place.rpartition("/")[2]] = item.reason
    return records, skipped


@pytest.mark.parametrize("number", [1, 2, 31, 32, 33, 40, 100])
def test_names_with_several_dots_are_samples(tmp_path: Path, number: int) -> None:
    files = [("first.png", PNG), ("first.txt", b"one dot")]
    for each in range(number):
        files += [(f"scan.2024.{each:04d}.png", PNG), (f"scan.2024.{each:04d}.txt", b"scan %d" % each)]
    tar(tmp_path / "0.tar", *files, ("last.png", PNG), ("last.txt", b"one dot"))
    records, skipped = read(WebDataset(path=f"{tmp_path}/0.tar"))
    scans = {f"scan.2024.{each:04d}.png": [f"scan {each}"] for each in range(number)}
    assert records == {"first.png": ["one dot"], **scans, "last.png": ["one dot"]}
    assert not skipped


def test_samples_with_other_pictures_say_so(tmp_path: Path) -> None:
    files: list[tuple[str, bytes]] = []
    for each in range(3):
        files += [(f"{each}.depth.png", PNG), (f"{each}.jpg", PNG), (f"{each}.txt", b"words")]
    files += [("views.left.png", PNG), ("views.right.png", PNG), ("views.txt", b"two of them")]
    files += [("scan.dcm", b"DICM"), ("scan.txt", b"words"), (".hidden.png", PNG), ("dir/._0.png", PNG)]
    tar(tmp_path / "0.tar", *files)
    records, skipped = read(WebDataset(path=f"{tmp_path}/0.tar"))
    assert records == {f"{each}.jpg": ["words"] for each in range(3)}
    assert skipped["0.tar"] == "3 '.depth.png' beside another picture of the sample, which is taken"
    assert "first dot" in skipped["0.tar:views.left.png"]
    assert "first dot" in skipped["0.tar:views.right.png"]
    assert skipped["0.tar:scan.dcm"] == "not a format that is read"
    assert skipped["0.tar:.hidden.png"] == skipped["._0.png"] == "its name begins with a dot"
    assert len(skipped) == 6


def test_files_that_stand_apart_and_names_twice_are_told(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", ("a.png", PNG), ("b.png", PNG), ("b.png", PNG), ("a.txt", b"x"), ("b.txt", b"y"))
    records, skipped = read(WebDataset(path=f"{tmp_path}/0.tar"))
    assert records == {"a.png": [], "b.png": []}
    assert "tar --sort=name" in skipped["0.tar:a"]
    assert "tar --sort=name" in skipped["0.tar:b"]
    assert skipped["0.tar:b.png"] == "a file of this name came before"


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"url": "u", "status": "success"}, "from txt"),
        ({"url": "u", "caption": None}, "from txt"),
        ({"caption": "  "}, "from txt"),
        ([], "from txt"),
        ([{"bbox": [0, 0, 1, 1]}], "from txt"),
        (7, "from txt"),
        ({"caption": "from json"}, "from json"),
        (["from json"], "from json"),
        ([{"from": "human", "value": "?"}, {"from": "gpt", "value": "from json"}], "from json"),
        (
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "from json"}]},
            "from json",
        ),
    ],
)
def test_metadata_hide_no_text(tmp_path: Path, entry: object, wanted: str) -> None:
    for bom in (b"", b"\xef\xbb\xbf"):
        json_bytes = bom + json.dumps(entry).encode()
        tar(tmp_path / "0.tar", ("a.json", json_bytes), ("a.png", PNG), ("a.txt", bom + b"from txt\r\n"))
        texts, skipped = read(WebDataset(path=f"{tmp_path}/0.tar"))
        assert texts == {"a.png": [wanted]}
        unused = (
            "'.json' without a text beside a '.txt'" if wanted == "from txt" else "'.txt' beside a '.json'"
        )
        assert skipped["0.tar"].startswith(f"1 {unused}")
        assert len(skipped) == 1


def test_a_damaged_json_is_listed_and_not_replaced(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", ("a.json", b'{"conversations": [{"fr'), ("a.png", PNG), ("a.txt", b"words"))
    records, skipped = read(WebDataset(path=f"{tmp_path}/0.tar"))
    assert not records
    assert "cannot be read" in skipped["0.tar:a"]


def test_equal_keys_in_shards_of_equal_names_are_all_kept(tmp_path: Path) -> None:
    for folder in ("x", "y", "z"):
        tar(tmp_path / folder / "0.tar", ("a.png", PNG), ("a.txt", folder.encode()))
    records, skipped = read(WebDataset(path=f"{tmp_path}/*/0.tar"))
    assert records == {"a.png": ["x"], "0/a.png": ["y"], "z/0/a.png": ["z"]}
    assert not skipped


def put(path: Path, form: str = "PNG", text: str | None = None, suffix: str = ".txt") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(1, (8, 6), form))
    if text is not None:
        path.with_suffix(suffix).write_text(text)


FORMATS = {
    "jpg": "JPEG", "JPEG": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP",
    "dib": "DIB", "tif": "TIFF", "gif": "GIF", "jp2": "JPEG2000", "ppm": "PPM", "tga": "TGA",
}  # fmt: skip


def test_formats_are_taken_or_listed(tmp_path: Path) -> None:
    for suffix, form in FORMATS.items():
        put(tmp_path / f"{suffix}.{suffix}", form, suffix)
    for suffix in ("heic", "DCM", "svg", "jxl"):
        (tmp_path / f"other.{suffix}").write_bytes(b"?")
    (tmp_path / "notes.xml").write_text("<a/>")
    (tmp_path / "README").write_text("read me")
    (tmp_path / "lonely.txt").write_text("no picture")
    records, skipped = read(ImageFolder(path=tmp_path))
    assert records == {f"{suffix}.{suffix}": [suffix] for suffix in sorted(FORMATS)}
    for item in ImageFolder(path=tmp_path).records():
        if isinstance(item, Record):
            assert Image.open(io.BytesIO(item.read_image())).size == (8, 6)
    assert {place for place in skipped if place.startswith("other.")} == {
        "other.heic", "other.DCM", "other.svg", "other.jxl"
    }  # fmt: skip
    assert skipped["other.DCM"] == "the format .dcm is not read; convert it to .png"
    assert skipped["lonely.txt"] == "no picture of this name is beside this text"
    assert skipped[tmp_path.name] == "files not looked at, by their suffix: 1 .xml, 1 without suffix"


def test_text_in_capitals_is_found_and_the_small_one_comes_first(tmp_path: Path) -> None:
    put(tmp_path / "A.PNG", text="capitals", suffix=".TXT")
    put(tmp_path / "b.png", text="small")
    (tmp_path / "b.TXT").write_text("capitals")
    source = ImageFolder(path=tmp_path)
    assert read(source)[0] == {"A.PNG": ["capitals"], "b.png": ["small"]}
    before = source.identity()
    (tmp_path / "A.TXT").write_text("other words")
    assert ImageFolder(path=tmp_path).identity() != before


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="root enters all")
def test_a_folder_that_cannot_be_entered_is_listed(tmp_path: Path) -> None:
    import subprocess
    import sys

    put(tmp_path / "a.png", text="here")
    put(tmp_path / "locked" / "b.png", text="there")
    (tmp_path / "locked").chmod(0)
    code = (
        "from fedcmp.extract.sources.image_folder import ImageFolder as F; "
        "print([getattr(i, 'id', None) or (i.place, i.reason) for i in F(path='pictures').records()])"
    )
    # As nobody, in a folder of its own: those above are this user's alone.
    drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    try:
        open_to_all = Path(os.path.realpath("/tmp")) / f"fedcmp-{os.getpid()}"
        tmp_path.chmod(0o755)
        os.rename(tmp_path, open_to_all)
        done = subprocess.run(
            [*drop, sys.executable, "-c", code.replace("'pictures'", repr(str(open_to_all)))],
            cwd=open_to_all, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        (open_to_all / "locked").chmod(0o755)
        os.rename(open_to_all, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"('{open_to_all}/locked', 'cannot be entered: Permission denied')" in done.stdout
    assert "'a.png'" in done.stdout


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    put(tmp_path / "root/in/a.png", text="a")
    put(tmp_path / "elsewhere/deep/b.png", text="b")
    (tmp_path / "root/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/out2").symlink_to(tmp_path / "elsewhere/deep")
    (tmp_path / "root/again").symlink_to(tmp_path / "root/in")
    (tmp_path / "root/in/up").symlink_to(tmp_path / "root")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path)
    (tmp_path / "root/nowhere").symlink_to(tmp_path / "gone")
    records, skipped = read(ImageFolder(path=tmp_path / "root"))
    assert records == {"in/a.png": ["a"], "out/deep/b.png": ["b"]}
    assert {name for name, reason in skipped.items() if "taken already" in reason} == {
        "out2", "again", "up", "circle"
    }  # fmt: skip


def test_one_file_has_one_name(tmp_path: Path) -> None:
    put(tmp_path / "x/a.png")
    names = ["x/a.png", "./x/a.png", "y/../x/a.png", "x//a.png", ["x/a.png"], str(tmp_path / "x/a.png")]
    outside = [
        "../a.png",
        "/etc/passwd",
        "x/../../a.png",
        f"{tmp_path}2/a.png",
        ".",
        str(tmp_path),
        "a\0.png",
    ]
    entries = [{"image": name, "caption": f"caption {n}"} for n, name in enumerate(names)]
    entries += [{"image": name, "caption": "no"} for name in [*outside, ["a.png", "b.png"], [], [3], None]]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    source = LlavaJson(path=tmp_path / "pairs.json", images=tmp_path)
    records, skipped = read(source)
    assert records == {"x/a.png": [f"caption {n}" for n in range(len(names))]}
    assert source.size() == 1
    reasons = list(skipped.values())
    assert all("lies outside 'images'" in reason for reason in reasons[: len(outside)])
    assert reasons[len(outside) :] == ["it names 2 images; one is read", *["it names no image"] * 3]


def test_names_of_captions_files_are_normal_too(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    (tmp_path / "c.csv").write_text(f"image,caption\n./a.png,one\n{tmp_path}/a.png,two\n../a.png,three\n")
    records, skipped = read(ImageFolder(path=tmp_path, captions=tmp_path / "c.csv"))
    assert records == {"a.png": ["one", "two"]}
    assert list(skipped.values()) == ["its image '../a.png' lies outside 'path'"]


def test_a_list_keeps_its_names_and_tells_what_it_cannot_use(tmp_path: Path) -> None:
    """Benchmarks look pictures up by the very names that they list."""
    put(tmp_path / "a.png")
    (tmp_path / "only.txt").write_text("./a.png\n../b.png\n\n./a.png\n")
    records, skipped = read(ImageFolder(path=tmp_path, only=tmp_path / "only.txt"))
    assert records == {"./a.png": []}
    assert list(skipped.values()) == ["its image '../b.png' lies outside 'path'"]


def test_names_behind_urls_are_relative_too() -> None:
    from fedcmp.pipeline.remote import Remote

    folder = Remote("s3://bucket/images/")
    assert image_name("s3://bucket/images/x/a.png", "images", folder) == "x/a.png"
    assert image_name("x/./a.png", "images", folder) == "x/a.png"
    with pytest.raises(ValueError, match="lies outside"):
        image_name("/x/a.png", "images", folder)
