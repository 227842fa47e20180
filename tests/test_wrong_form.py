"""Data that are in a benchmark's form but not what its rule is about: handled, or refused with a remedy."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import caches
import pytest
from click.testing import CliRunner
from conftest import picture
from test_benchmarks import build, items_of

from fedcmp.cli import main
from fedcmp.evaluate.benchmarks.base import Item
from fedcmp.evaluate.official.files import Problem
from fedcmp.evaluate.official.short_answers import mmbench_option
from fedcmp.evaluate.statistics import value_of
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.errors import UserError


@pytest.mark.parametrize(
    ("name", "file"),
    [("vqav2", "annotations.json"), ("vizwiz", "val.json"), ("textvqa", "TextVQA_0.5.1_val.json")],
)
@pytest.mark.parametrize("number", [1, 3, 4])
def test_fewer_than_four_annotators_are_refused(name: str, file: str, number: int, tmp_path: Path) -> None:
    benchmark = build(name, tmp_path)
    path = tmp_path / file
    content = json.loads(path.read_text())
    listed = content if isinstance(content, list) else content.get("annotations", content.get("data"))
    for entry in listed:
        entry["answers"] = entry["answers"][:number]
    path.write_text(json.dumps(content))
    problems = [each for each in benchmark.items(None) if isinstance(each, Problem)]
    items = [each for each in benchmark.items(None) if isinstance(each, Item)]
    assert len(items) == (len(listed) if number == 4 else 0)
    if number < 4:
        assert f"{number} answers instead of ten" in problems[0].reason
        assert "name = 'gqa'" in problems[0].reason
        return
    points = benchmark.points(items, {each.id: benchmark.show_reference(each) for each in items})
    assert points is not None
    assert points == [1.0] * len(items)


def tsv(root: Path, letters: str, rows: list[list[str]]) -> None:
    heads = ["index", "question", *letters, "answer", "category", "l2-category", "image"]
    (root / "mmbench_dev.tsv").write_text("\n".join("\t".join(row) for row in [heads, *rows]) + "\n")


def test_a_fifth_option_is_an_option(tmp_path: Path) -> None:
    benchmark = build("mmbench", tmp_path)
    image = base64.b64encode(picture(1)).decode()
    words = ["ox", "cat", "hen", "pig", "dog"]
    tsv(
        tmp_path,
        "ABCDE",
        [["1", "What?", *words, "E", "a", "b", image], ["2", "?", *words[:4], "", "E", "a", "b", "1"]],
    )
    first, second = benchmark.items(None)
    assert isinstance(first, Item)
    assert first.text.turns[0].content.count("\nE. dog") == 1
    assert first.options == ("A", "B", "C", "D", "E")
    for said in ("E", "The answer is E.", "a dog"):
        assert value_of(benchmark.score([first], {"1": said})["accuracy"]) == 1
    assert value_of(benchmark.score([first], {"1": "A"})["accuracy"]) == 0
    assert isinstance(second, Problem)
    assert second.reason.endswith("the answer 'E' is none of the options A, B, C, D")
    assert benchmark.submissions([first], {"1": "E"})["mmbench.xlsx"]


def test_four_options_are_read_by_the_official_rule() -> None:
    four = dict(zip("ABCD", ("ox", "cat", "hen", "pig"), strict=True))
    assert mmbench_option("the answer is e, no, the answer is b", four) == "B"


def test_images_go_into_their_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    benchmark = build("mmbench", tmp_path / "in")
    coded = base64.encodebytes(picture(1)).decode().strip()
    assert "\n" in coded
    rows = [
        [index, "?", "ox", "cat", "", "", "A", "a", "b", image]
        for index, image in (
            ("../../x", coded.replace("\n", "")),
            ("/tmp/x", coded.replace("\n", "")),
            ("7", f'"{coded}"'),
            ("8", "not base64!"),
            ("9", "7"),
        )
    ]
    tsv(tmp_path / "in", "ABCD", rows)
    folder = tmp_path / "in" / "pictures" / "deep"
    benchmark.unpack(folder)
    assert sorted(path.name for path in tmp_path.rglob("*.jpg")) == ["7.jpg"]
    assert (folder / "7.jpg").read_bytes() == picture(1)
    assert "3 images are not base64 and are left out (first: " in capsys.readouterr().out
    found = benchmark.items(None)
    problems = [each.reason for each in found if isinstance(each, Problem)]
    assert [reason.partition(": ")[2] for reason in problems] == [
        "index '../../x' is not a number",
        "index '/tmp/x' is not a number",
    ]


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname", "a/../../b.png"])
def test_names_of_images_stay_in_their_folder(image: str, tmp_path: Path) -> None:
    for name, file, key in (
        ("pope", "coco_pope_random.json", "image"),
        ("gqa", "testdev_balanced_questions.json", "imageId"),
        ("seed_bench", "SEED-Bench.json", "data_id"),
        ("vizwiz", "val.json", "image"),
        ("mm_vet", "mm-vet.json", "imagename"),
        ("captions", "dataset_coco.json", "filename"),
        ("retrieval", "dataset_coco.json", "filename"),
        ("scienceqa", "llava_test_CQM-A.json", "image"),
    ):
        (tmp_path / name).mkdir()
        benchmark = build(name, tmp_path / name)
        number = len(items_of(benchmark))
        path = tmp_path / name / file
        path.write_text(re.sub(rf'"{key}": "[^"]*"', f'"{key}": "{image}"', path.read_text(), count=1))
        items = [each for each in benchmark.items(None) if isinstance(each, Item)]
        if name in ("captions", "retrieval") and image.startswith("/"):
            assert not [each for each in items if each.image.startswith("/")]  # it is one below a folder
            continue
        (problem,) = (each for each in benchmark.items(None) if isinstance(each, Problem))
        assert len(items) == number - 1
        assert "is outside of the folder of images" in problem.reason


def test_a_folder_in_another_layout_is_told_the_layout(tmp_path: Path) -> None:
    benchmark = build("mme", tmp_path / "MME_Benchmark_release_version")
    (tmp_path / "MME_Benchmark_release_version").rename(tmp_path / "inner")
    (tmp_path / "MME_Benchmark_release_version").mkdir()
    with pytest.raises(
        UserError, match=r"expected CATEGORY/NAME\.txt beside NAME\.jpg.*categories: existence, count"
    ):
        benchmark.items(None)


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path: Path) -> None:
    cache = caches.write(tmp_path / "all.zarr", caches.features(6))
    (tmp_path / "ids.txt").write_text("\n".join(cache.ids[:2]) + "\n", encoding="utf-8-sig")
    words = [
        "cache",
        "subset",
        tmp_path / "all.zarr",
        "--out",
        tmp_path / "two.zarr",
        "--ids",
        tmp_path / "ids.txt",
    ]
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert FeatureCache(tmp_path / "two.zarr").ids == cache.ids[:2]
