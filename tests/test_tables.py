"""Tables of every kind and damage, pictures inside them, and the rules of the benchmarks over them."""

from __future__ import annotations

import base64
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scores import fine, refused

from fedcmp.components import load
from fedcmp.evaluate.benchmarks.base import BENCHMARKS, Benchmark, Item
from fedcmp.evaluate.benchmarks.yes_no import YesNo
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.classification import (
    auroc_parts,
    confusion,
    macro_auroc,
    macro_f1,
    one_against_rest,
)
from fedcmp.evaluate.official.files import Problem
from fedcmp.evaluate.official.parquet import batches_here
from fedcmp.evaluate.official.pictures import picture as read_picture
from fedcmp.evaluate.official.pictures import picture_name
from fedcmp.evaluate.official.short_answers import aokvqa_accuracy, token_overlap, yes_no_word
from fedcmp.evaluate.official.tables import Row, table
from fedcmp.evaluate.report.groups import grouped
from fedcmp.evaluate.report.judged import judged_runs
from fedcmp.evaluate.statistics import bootstrap, interval, pooled, value_of
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Component

JPEG = picture(1, form="jpeg")


def build(name: str, path: Path, **options: Any) -> Benchmark:
    return BENCHMARKS.build(Component.model_validate({"name": name, "path": path, **options}), name)


def of_rows(name: str, root: Path, rows: list[Any], **options: Any) -> Benchmark:
    path = root / "rows.json"
    path.write_text(json.dumps(rows))
    return build(name, path, **options)


def split(benchmark: Benchmark) -> tuple[list[Item], list[str]]:
    found = benchmark.items(None)
    items = [each for each in found if isinstance(each, Item)]
    return items, [each.reason for each in found if isinstance(each, Problem)]


def rows_of(path: Path) -> list[Any]:
    return [row.cells if isinstance(row, Row) else row.reason for _, row in table(path, "rows")]


# Reading


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"a": 1}, 2]', [{"a": 1}, "not an object"]),
        ("a.json", '\ufeff{"info": {}, "licences": ["x"], "rows": [{"a": 1}]}', [{"a": 1}]),
        ("a.json", '{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("a.jsonl", '{"a": 1}\n\n{broken\n[]\n', [{"a": 1}, "a.jsonl:3: not valid JSON", "not an object"]),
        (
            "a.csv",
            '\ufeffa,b\n1,"x, ""y""\nz"\n\n2\n3,4,5\n',
            [{"a": "1", "b": 'x, "y"\nz'}, {"a": "2", "b": None}, "a.csv, row 3: 3 cells under 2 heads"],
        ),
        ("a.tsv", "a\tb\n1\tx, y\n", [{"a": "1", "b": "x, y"}]),
    ],
)
def test_tables_are_read_row_by_row(name: str, content: str, expected: list[Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    for ours, theirs in zip(rows_of(tmp_path / name), expected, strict=True):
        assert theirs in ours if isinstance(theirs, str) else ours == theirs


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"a": [{}], "b": [{}]}', "an object with one such list; its fields: a, b"),
        ("a.json", "3", "expected a list of rows, found int"),
        ("a.csv", 'a,b\n1,"open\n', "a.csv:.*not a table of commas and quotes"),
        ("a.tsv", 'a\tb\n1\t"open\n', "not a table of tabs and quotes"),
        ("a.csv", "a,b\n1,\u00e9\n".encode("utf-16"), "a.csv: rows is not UTF-8"),
        ("a.parquet", "PAR1 and nothing else PAR1", "a.parquet: rows is not valid parquet"),
        ("a.parquet", "", "a.parquet: rows is not valid parquet"),
        ("a.xlsx", "", "rows are a table in .json, .jsonl, .csv, .tsv, .parquet, not '.xlsx'"),
    ],
)
def test_what_is_no_table_is_one_clear_error(
    name: str, content: str | bytes, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path / name)


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.json", "a.jsonl", "a.csv", "a.parquet"):
        with pytest.raises(UserError, match=f"{name}: rows cannot be read"):
            rows_of(tmp_path / name)
    with pytest.raises(UserError, match=r"a-\*.csv: rows: no file fits this pattern"):
        rows_of(tmp_path / "a-*.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'fedcmp\[parquet\]'"):
        rows_of(tmp_path / "a.parquet")


def test_several_files_are_one_table(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        (tmp_path / f"part-{number}.csv").write_text(f"a\n{number}\n{number}\n")
    found = [row for _, row in table(tmp_path / "part-*.csv", "rows")]
    assert [row.cells["a"] for row in found if isinstance(row, Row)] == ["0", "0", "1", "1", "2", "2"]
    assert [row.number for row in found if isinstance(row, Row)] == list(range(6))


def big_parquet(path: Path, number: int, size: int) -> None:
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetWriter(path, pyarrow.schema({"a": "int64", "image": "binary"})) as writer:
        for start in range(0, number, 20):
            numbers = list(range(start, start + 20))
            images = [random.Random(n).randbytes(size) for n in numbers]
            writer.write_table(pyarrow.table({"a": numbers, "image": images}))


def test_of_parquet_only_some_rows_and_columns_are_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow

    path = tmp_path / "a.parquet"
    big_parquet(path, 400, 100_000)
    before, most, number = pyarrow.total_allocated_bytes(), 0, 0
    for rows in batches_here(path, "rows", None):
        assert [row["a"] for row in rows] == list(range(number, number + len(rows)))
        number += len(rows)
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert number == 400
    assert most < 10_000_000 < path.stat().st_size
    found = [row for _, row in table(path, "rows", {"a", "z"})]
    assert [row.cells for row in found if isinstance(row, Row)] == [{"a": n} for n in range(400)]


def test_damaged_parquet_ends_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    big_parquet(path, 20, 300)
    whole = path.read_bytes()
    rng, refusals = random.Random(0), 0
    for _ in range(12):
        damaged = bytearray(whole)
        for _ in range(6):
            damaged[rng.randrange(len(whole) // 2, len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            assert len(rows_of(path)) <= 20
        except UserError:
            refusals += 1
    assert refusals > 3


# Pictures

CODED = base64.b64encode(JPEG).decode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (JPEG, JPEG),
        ({"bytes": JPEG, "path": "x.jpg"}, JPEG),
        ({"bytes": None, "path": "a/x.jpg"}, "a/x.jpg"),
        ([{"bytes": JPEG, "path": None}], JPEG),
        (CODED, JPEG),
        ("\n".join(CODED[start : start + 76] for start in range(0, len(CODED), 76)), JPEG),
        (f"data:image/jpeg;base64,{CODED}", JPEG),
        ("scans/1.png", "scans/1.png"),
        ("a" * 200, "a" * 200),
        ("12", "12"),
        (12, 12),
    ],
)
def test_pictures_in_cells(value: Any, expected: Any) -> None:
    assert read_picture(value, "here") == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "here: no image"),
        ("  ", "here: no image"),
        (b"", "here: no image"),
        (True, "here: no image"),
        (1.5, "here: no image"),
        ({"bytes": None, "path": None}, "here: no image"),
        ([], "here: 0 images, not one"),
        ([JPEG, JPEG], "here: 2 images, not one"),
        (CODED[:100] + "!" + CODED[100:], "here: the image is not base64"),
        (f"data:image/png;base64,{'?' * 80}", "here: the image is not base64"),
    ],
)
def test_cells_without_a_picture(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_picture(value, "here")


def test_pictures_are_named_by_content(tmp_path: Path) -> None:
    assert picture_name(JPEG) == picture_name(bytes(JPEG))
    assert picture_name(JPEG) != picture_name(picture(2, form="jpeg"))
    for form, suffix in (
        ("jpeg", ".jpg"),
        ("png", ".png"),
        ("gif", ".gif"),
        ("webp", ".webp"),
        ("bmp", ".bmp"),
    ):
        assert picture_name(picture(1, form=form)).endswith(suffix)
    assert picture_name(b"nothing known").endswith(".jpg")


def test_rows_refer_to_pictures_of_others_before_and_after(tmp_path: Path) -> None:
    lines = ["index\tquestion\tanswer\timage\tsplit"]
    images = {"7": CODED, "8": "7", "9": "10", "10": base64.b64encode(picture(2, form="jpeg")).decode()}
    images |= {"11": "99", "12": CODED[:90] + "!" + CODED[90:]}
    lines += [f"{index}\tIs it?\tyes\t{image}\t{int(index) % 2}" for index, image in images.items()]
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(lines) + "\n")
    items, problems = split(build("yes_no", path, columns={"id": "index"}))
    named = {each.id: each.image for each in items}
    assert named["7"] == named["8"] == picture_name(JPEG)
    assert named["9"] == named["10"] == picture_name(picture(2, form="jpeg"))
    assert named["11"] == "99"  # a missing image, which is counted when it is asked about
    assert len(problems) == 1
    assert "row 6, 'image': the image is not base64" in problems[0]
    # The row that has the picture need not be asked itself, and no other picture is written.
    some = build("yes_no", path, where={"split": 0})
    some.unpack(tmp_path / "out")
    assert [each.image for each in split(some)[0]] == [named["8"], named["10"]]
    assert {each.name for each in (tmp_path / "out").iterdir()} == {named["8"], named["10"]}
    assert (tmp_path / "out" / named["8"]).read_bytes() == JPEG


@pytest.mark.parametrize("image", ["../x.png", "/etc/x.png", "a/../../x.png"])
def test_names_of_pictures_stay_in_their_folder(image: str, tmp_path: Path) -> None:
    row = {"question": "?", "answer": "yes"}
    benchmark = of_rows("vqa", tmp_path, [row | {"image": image}, row | {"image": "./b/x.png"}])
    items, problems = split(benchmark)
    assert [each.image for each in items] == ["b/x.png"]
    assert "is outside of the folder of images" in problems[0]


def test_names_from_ids(tmp_path: Path) -> None:
    rows = [{"image": number, "question": "?", "answer": "yes"} for number in (7, "8", "x9")]
    items, problems = split(of_rows("vqa", tmp_path, rows, image_name="{image_id:04d}.jpg"))
    assert [each.image for each in items] == ["0007.jpg", "0008.jpg"]
    assert "image_name = '{image_id:04d}.jpg' does not fit image id 'x9'" in problems[0]
    items, _ = split(of_rows("vqa", tmp_path, [rows[1] | {"image": "008"}], image_name="{image_id}.jpg"))
    assert items[0].image == "008.jpg"


# Rows


def test_filters_take_texts_numbers_and_truth_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "image,question,answer,hard,level,lang\n1.png,?,yes,True,1,en\n2.png,?,no,false,2,en\n3.png,?,no,FALSE,10,zh\n"
    )
    for where, expected in (
        ({"hard": False}, ["2.png", "3.png"]),
        ({"level": [1, 10]}, ["1.png", "3.png"]),
        ({"level": "10", "lang": "zh"}, ["3.png"]),
        ({}, ["1.png", "2.png", "3.png"]),
    ):
        items, problems = split(build("vqa", tmp_path / "a.csv", where=where))
        assert [each.image for each in items] == expected
        assert not problems
    rows = [
        {"image": "1.png", "question": "?", "answer": "yes", "hard": value}
        for value in (True, "true", 1, None)
    ]
    assert len(split(of_rows("vqa", tmp_path, rows, where={"hard": True}))[0]) == 2
    with pytest.raises(UserError, match=r"no row fits where = \{'level': 3\}"):
        build("vqa", tmp_path / "a.csv", where={"level": 3}).items(None)
    items, problems = split(build("vqa", tmp_path / "a.csv", where={"leval": 3}))
    assert not items
    assert "no column 'leval'; did you mean 'level'?" in problems[0]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("vqa", {"answer": ""}, "'answer' is empty"),
        ("vqa", {"answer": None}, "'answer' is empty"),
        ("vqa", {"answer": []}, "'answer' is empty"),
        ("vqa", {"answer": ["a", ""]}, "'answer' is empty"),
        ("vqa", {"answer": ["a", "b"]}, "2 answers, .* set agreement = 'any'"),
        ("vqa", {"answer": {"a": 1}}, "'answer': dict in place of a text"),
        ("vqa", {"question": "  "}, "'question' is empty"),
        ("yes_no", {"answer": "maybe"}, "answer 'maybe' is neither yes nor no"),
        ("classify", {"label": 3}, "label 3 is a number; give the names of the classes in 'classes'"),
        ("classify", {"label": None}, "'label' is empty"),
        ("caption_table", {"caption": ["", "a dog"]}, "'caption' is empty"),
        ("mcq", {"answer": "E"}, "answer 'E' is none of A. ox; B. hen"),
        ("mcq", {"B": None}, "1 options in A, B"),
        ("mcq", {"B": None, "C": "pig"}, "have a gap"),
    ],
)
def test_rows_that_cannot_be_asked_are_told_and_stop_no_other(
    name: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    fine_row = {
        "image": "1.png",
        "question": "?",
        "answer": "A" if name == "mcq" else "yes",
        "A": "ox",
        "B": "hen",
    }
    fine_row |= {"label": "dog", "caption": "a dog"}
    rows = [fine_row, fine_row | row, fine_row | {"image": "2.png", "label": "cat"}]
    items, problems = split(of_rows(name, tmp_path, rows))
    assert len(items) == 2
    assert len(problems) == 1
    assert re.search(rf"rows.json\[1\].*{message}", problems[0])


def test_a_column_of_another_name_is_told(tmp_path: Path) -> None:
    row = {"Image": "1.png", "Question": "?", "answer": "yes", "kind": "OPEN"}
    for columns, message in (
        ({}, "no column 'image'; did you mean 'Image'?"),
        ({"image": "Image"}, "no column 'question'; did you mean 'Question'?"),
        (
            {"image": "Image", "question": "Question", "type": "kinds"},
            "no column 'kinds'; did you mean 'kind'?",
        ),
        ({"image": "Image", "question": "Question", "id": "qid"}, "no column 'qid'"),
    ):
        assert message in split(of_rows("vqa", tmp_path, [row], columns=columns))[1][0]
    with pytest.raises(UserError, match=r"unknown key 'vqa\.columns\.imag'; did you mean 'image'"):
        of_rows("vqa", tmp_path, [row], columns={"imag": "Image"})


# Answers of multiple choice

FOUR = {"A": "2", "B": "3", "C": "0", "D": "seven"}


@pytest.mark.parametrize(
    ("row", "options", "expected"),
    [
        ({"answer": "B"}, {}, "B"),
        ({"answer": "seven"}, {}, "D"),
        ({"answer": "D. Seven"}, {}, "D"),
        ({"answer": "1"}, {}, "B"),
        ({"answer": 1}, {}, "B"),
        ({"answer": 3}, {"answer_as": "number"}, "D"),
        ({"answer": "3"}, {"answer_as": "text"}, "B"),
        ({"answer": "3"}, {}, "answer '3' may be several of .*; set answer_as = 'number' or 'text'"),
        ({"answer": "B", "A": "B", "B": "A"}, {}, "answer 'B' may be several of .* 'letter' or 'text'"),
        ({"answer": "B", "A": "B", "B": "A"}, {"answer_as": "letter"}, "B"),
        ({"answer": "4"}, {}, "answer '4' is none of A. 2"),
        ({"answer": "b"}, {}, "answer 'b' is none of"),
        ({"answer": "B"}, {"answer_as": "text"}, "answer 'B' is none of"),
        ({"answer": "1", "options": ["ox", "hen"]}, {"columns": {"options": "options"}}, "B"),
        ({"answer": "hen", "options": '["ox", "hen"]'}, {"columns": {"options": "options"}}, "B"),
        ({"answer": "hen", "options": "['ox', 'hen']"}, {"columns": {"options": "options"}}, "B"),
        (
            {"answer": "hen", "options": "ox, hen"},
            {"columns": {"options": "options"}},
            "not a list of options",
        ),
        ({"answer": "C"}, {"letters": "ABC"}, "C"),
        ({"answer": "D"}, {"letters": "ABC"}, "answer 'D' is none of"),
    ],
)
def test_answers_are_letters_numbers_or_texts(
    row: dict[str, Any], options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    items, problems = split(
        of_rows("mcq", tmp_path, [{"image": "1.png", "question": "?", **FOUR, **row}], **options)
    )
    if len(expected) == 1:
        assert [each.truth["answer"] for each in items] == [expected], problems
    else:
        assert re.search(expected, problems[0])


def test_options_that_begin_with_their_letter_lose_it(tmp_path: Path) -> None:
    row = {
        "image": "1.png",
        "question": "?",
        "answer": "A",
        "A": "A: an ox",
        "B": " B.hen ",
        "C": "C) C: pig",
    }
    (item,) = split(of_rows("mcq", tmp_path, [row]))[0]
    assert item.truth["choices"] == {"A": "an ox", "B": "hen", "C": "C: pig"}
    (item,) = split(of_rows("mcq", tmp_path, [row | {"C": "pig"}]))[0]
    assert item.truth["choices"]["A"] == "A: an ox"


# Rules. Values of LLaVA-Med's evaluate_metrics.py and VLMEvalKit's yorn.py, computed by their code.

OVERLAPS = [
    ("The left lung.", "left lung", (1.0, 1.0, 1.0)),
    ("lung lung lung", "the lungs, lung", (0.8571428571428571, 1.0, 0.75)),
    ("it is in the right-sided pleura", "right pleura", (0.5, 0.3333333333333333, 1.0)),
    ("two masses, 1,000 ml", "2 masses", (0.6666666666666666, 0.5, 1.0)),
    ("", "left", (0.0, 0.0, 0.0)),
    ("right", "left", (0.0, 0.0, 0.0)),
    ("dont know", "don't know", (1.0, 1.0, 1.0)),
    (
        "pneumothorax on the left side",
        "left-sided pneumothorax",
        (0.5714285714285715, 0.5, 0.6666666666666666),
    ),
]
WORDS = [
    ("Yes.", "yes"),
    ("No, there is none", "no"),
    ("It is normal", None),
    ("yes or no", None),
    ("(YES)", "yes"),
    ("there is not", None),
    ("no-one", "no"),
    ("", None),
]


@pytest.mark.parametrize(("said", "reference", "expected"), OVERLAPS)
def test_word_overlap_is_llava_meds(said: str, reference: str, expected: tuple[float, float, float]) -> None:
    assert token_overlap(said, reference) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("said", "expected"), WORDS)
def test_yes_and_no_are_vlmevalkits(said: str, expected: str | None) -> None:
    assert yes_no_word(said) == expected


@given(st.text(max_size=40), st.text(max_size=20))
def test_rules_take_any_text(said: str, reference: str) -> None:
    f1, precision, recall = token_overlap(said, reference)
    assert all(0 <= each <= 1 for each in (f1, precision, recall))
    assert min(precision, recall) - 1e-12 <= f1 <= max(precision, recall) + 1e-12
    assert yes_no_word(said) in ("yes", "no", None)
    assert aokvqa_accuracy(said, [said] * 3) == 1


def test_open_and_closed_questions_are_scored_apart(tmp_path: Path) -> None:
    rows = [
        {"question": "Is it?", "answer": "Yes", "answer_type": "CLOSED"},
        {"question": "Left or right?", "answer": "Left", "answer_type": "CLOSED"},
        {"question": "What?", "answer": "left lung", "answer_type": "OPEN"},
        {"question": "Is it?", "answer": "no", "answer_type": "OPEN"},
    ]
    rows = [{"image": f"{n}.png", **row} for n, row in enumerate(rows)]
    benchmark = of_rows("vqa", tmp_path, rows, group="answer_type")
    items, _ = split(benchmark)
    answers = dict(
        zip("0123", ("Yes, it is normal.", "The left.", "the lower left lung", "no."), strict=True)
    )
    values = {name: value_of(each) for name, each in benchmark.score(items, answers).items()}
    assert values == pytest.approx(
        {
            "accuracy": 3 / 4,
            "closed accuracy": 1,
            "open accuracy": 1 / 2,
            "open recall": 1,
            "open F1": (0.8 + 1) / 2,
            "open BLEU-1": 3 / 4,
            "accuracy answer_type CLOSED": 1,
            "accuracy answer_type OPEN": 1 / 2,
        },
        abs=1e-6,
    )
    untyped = of_rows("vqa", tmp_path, [{k: v for k, v in row.items() if k != "answer_type"} for row in rows])
    assert [each.truth["closed"] for each in split(untyped)[0]] == [True, False, False, True]


def test_agreement_with_several_people(tmp_path: Path) -> None:
    row = {"image": "1.png", "question": "?", "answer": ["red"] * 2 + ["the red"] + ["blue"] * 7}
    for agreement, expected in (("leave_one_out", 0.9), ("thirds", 1.0), ("any", 1.0)):
        benchmark = of_rows("vqa", tmp_path, [row], agreement=agreement)
        items, _ = split(benchmark)
        assert benchmark.points(items, {"0": "red"}) == pytest.approx([expected])
        assert benchmark.show_reference(items[0]) == "blue"
    benchmark = of_rows("vqa", tmp_path, [row | {"answer": ["red", "ruby"]}], agreement="any")
    assert benchmark.points(split(benchmark)[0], {"0": "Ruby."}) == [1.0]


def test_yes_no_figures_and_undecided_answers(tmp_path: Path) -> None:
    rows = [
        {"image": f"{n}.png", "question": "?", "answer": answer, "kind": "ab"[n % 2]}
        for n, answer in enumerate(("yes", 1, True, "no", 0, False))
    ]
    benchmark = of_rows("yes_no", tmp_path, rows, group="kind")
    items, _ = split(benchmark)
    said = ["Yes", "no", "a dog", "yes", "No.", "neither yes nor no"]
    values = {
        name: value_of(each)
        for name, each in benchmark.score(items, dict(zip("012345", said, strict=True))).items()
    }
    assert values["accuracy"] == pytest.approx(2 / 6)
    assert (values["precision"], values["recall"], values["f1"]) == pytest.approx((1 / 2, 1 / 3, 2 / 5))
    assert (values["yes ratio"], values["undecided"]) == pytest.approx((2 / 6, 2 / 6))
    assert values["accuracy kind a"] == pytest.approx(2 / 3)
    counts, warning = benchmark.remarks(said)
    assert counts == {"undecided answers": 2}
    assert "taken for wrong; 'rank = true' chooses the likelier word" in str(warning)
    assert YesNo(path=tmp_path, rank=True).remarks(said) == ({}, None)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, (0.72, 0.625, 0.59375)),
        (1, (0.7254901960784313, 0.5, 0.5517241379310345)),
        (2, (0.8269230769230769, 0.625, 0.7333333333333333)),
        (3, (0.82, 0.7083333333333334, 0.6896551724137931)),
    ],
)
def test_groups_that_must_be_right_together(
    seed: int, expected: tuple[float, float, float], tmp_path: Path
) -> None:
    """Values of lmms-eval 0.7.3's `hb_aggregation_result_intern`: HallusionBench's aAcc, fAcc and qAcc."""
    rng = random.Random(seed)
    rows = [
        {
            "image": "1.png",
            "question": "?",
            "category": category,
            "subcategory": subcategory,
            "set_id": str(group),
            "figure_id": str(figure),
            "question_id": str(number),
            "gt_answer": str(rng.randint(0, 1)),
        }
        for category in ("VD", "VS")
        for subcategory in ("chart", "map")
        for group in range(3)
        for figure in range(2)
        for number in range(rng.randint(1, 3))
    ]
    base = ["category", "subcategory", "set_id"]
    together = {"fAcc": [*base, "figure_id"], "qAcc": [*base, "question_id"]}
    benchmark = of_rows("yes_no", tmp_path, rows, columns={"answer": "gt_answer"}, together=together)
    items, _ = split(benchmark)
    truths = [int(row["gt_answer"]) for row in rows]
    said = [("No", "Yes")[truth if rng.random() < 0.8 else 1 - truth] for truth in truths]
    metrics = benchmark.score(items, {each.id: answer for each, answer in zip(items, said, strict=True)})
    found = [value_of(metrics[name]) for name in ("accuracy", "fAcc", "qAcc")]
    assert found == pytest.approx(expected, abs=1e-12)


# Classes


def random_classes(seed: int, items: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, items)
    # Some are equal, as rounded ones are.
    likelihoods = np.round(rng.normal(-20, 3, (items, classes)) + 2 * np.eye(classes)[true], 1)
    return likelihoods, true


@pytest.mark.parametrize(("seed", "items", "classes"), [(0, 40, 2), (1, 60, 3), (2, 200, 7), (3, 12, 5)])
def test_classes_are_scored_as_by_scikit_learn(seed: int, items: int, classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    likelihoods, true = random_classes(seed, items, classes)
    said = likelihoods.argmax(1)
    ours = macro_f1(confusion(said, true, classes).sum(0))
    assert ours == pytest.approx(metrics.f1_score(true, said, average="macro", zero_division=0))
    odds = one_against_rest(likelihoods)
    areas = [
        metrics.roc_auc_score(true == column, odds[:, column])
        for column in range(classes)
        if 0 < (true == column).sum() < items
    ]
    assert macro_auroc(auroc_parts(odds, true).sum(0)) == pytest.approx(np.mean(areas))
    if classes > 2 and len(areas) == classes:
        probabilities = np.exp(likelihoods - likelihoods.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        theirs = metrics.roc_auc_score(true, probabilities, multi_class="ovr", average="macro")
        assert macro_auroc(auroc_parts(odds, true).sum(0)) == pytest.approx(theirs)


def test_values_of_scikit_learn() -> None:
    """Of scikit-learn 1.9.1, for where it is not installed."""
    likelihoods, true = random_classes(1, 60, 3)
    said = likelihoods.argmax(1)
    assert macro_f1(confusion(said, true, 3).sum(0)) == pytest.approx(0.5789999468622137, abs=1e-12)
    area = macro_auroc(auroc_parts(one_against_rest(likelihoods), true).sum(0))
    assert area == pytest.approx(0.7819140042056709, abs=1e-12)


def test_log_odds_do_not_saturate_and_order_as_probabilities_do() -> None:
    far = np.array([[0.0, -800.0, -900.0], [0.0, -700.0, -950.0]])
    odds = one_against_rest(far)
    assert np.isfinite(odds).all()
    assert odds[0, 0] == pytest.approx(800)
    assert odds[1, 0] == pytest.approx(700)
    likelihoods, _ = random_classes(5, 50, 4)
    probabilities = np.exp(likelihoods) / np.exp(likelihoods).sum(1, keepdims=True)
    expected = np.log(probabilities / (1 - probabilities))
    np.testing.assert_allclose(one_against_rest(likelihoods), expected, rtol=1e-6)


def test_the_interval_of_an_area_is_that_of_resampled_areas() -> None:
    likelihoods, true = random_classes(2, 300, 3)
    odds, images = one_against_rest(likelihoods), [str(n) for n in range(300)]
    ours = bootstrap([Metric(images, auroc_parts(odds, true), macro_auroc)], np.random.default_rng(0), 2000)[
        0
    ]
    rng = np.random.default_rng(1)
    theirs = []
    for _ in range(400):
        drawn = rng.integers(0, 300, 300)
        theirs.append(macro_auroc(auroc_parts(odds[drawn], true[drawn]).sum(0)))
    assert ours.std() == pytest.approx(np.std(theirs), rel=0.12)
    assert ours.mean() == pytest.approx(np.mean(theirs), abs=0.004)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(2, 5))
def test_figures_of_classes_are_shares(seed: int, items: int, classes: int) -> None:
    likelihoods, true = random_classes(seed, items, classes)
    weights = np.random.default_rng(seed).integers(0, 3, (50, items)).astype(float)
    for value, parts in (
        (macro_f1, confusion(likelihoods.argmax(1), true, classes)),
        (macro_auroc, auroc_parts(one_against_rest(likelihoods), true)),
    ):
        found = value(weights @ parts)
        assert found.shape == (50,)
        assert ((found >= 0) & (found <= 1)).all()


def test_classes_are_named_by_labels_numbers_or_words(tmp_path: Path) -> None:
    rows = [{"image": f"{n}.png", "label": label} for n, label in enumerate(("star", "ring", "star"))]
    items, _ = split(of_rows("classify", tmp_path, rows))
    assert items[0].options == ("ring", "star")
    for labels, classes, expected in (
        ((0, "1", 1), ["ring", "star"], ["ring", "star", "star"]),
        ((0, "1", 1), {"0": "a ring", "1": "a star"}, ["a ring", "a star", "a star"]),
        (
            ("NORMAL", "PNEUMONIA", 1),
            {"NORMAL": "a healthy lung", "PNEUMONIA": "pneumonia"},
            ["a healthy lung", "pneumonia", "pneumonia"],
        ),
    ):
        rows = [{"image": f"{n}.png", "label": label} for n, label in enumerate(labels)]
        items, problems = split(of_rows("classify", tmp_path, rows, classes=classes))
        assert [each.truth["label"] for each in items] == expected, problems
    rows = [{"image": "1.png", "label": "stars"}, {"image": "2.png", "label": "ring"}]
    assert (
        "label 'stars' is none of the classes; did you mean 'star'?"
        in split(of_rows("classify", tmp_path, rows, classes=["ring", "star"]))[1][0]
    )
    with pytest.raises(UserError, match="1 classes instead of 2 to 1000"):
        of_rows("classify", tmp_path, rows[:1]).items(None)


def test_long_names_can_be_freed_from_their_disadvantage(tmp_path: Path) -> None:
    rows = [{"image": "1.png", "label": "a five-pointed star"}, {"image": "2.png", "label": "ring"}]
    losses = {"0": [12.0, 4.0], "1": [12.0, 4.0]}
    for per_byte, points in ((False, [0.0, 1.0]), (True, [1.0, 0.0])):
        benchmark = of_rows("classify", tmp_path, rows, per_byte=per_byte)
        items, _ = split(benchmark)
        assert items[0].options == ("a five-pointed star", "ring")
        assert benchmark.points(items, losses) == points
        assert value_of(benchmark.score(items, losses)["accuracy"]) == np.mean(points)
        assert benchmark.settings == ({"likelihood": "per byte"} if per_byte else {})
        assert interval(benchmark.score(items, losses)["AUROC"], np.random.default_rng(0), 100).value == 0.5


# Through the command line

TABLE = """
extends = "{extracted}"
build = "{root}/build"

[evaluate.benchmarks.own]
name = "{name}"
path = "{root}/own.jsonl"
silo = "heldout"
"""


def own(extracted: Path, root: Path, name: str, rows: list[dict[str, Any]], more: str = "") -> Path:
    (root / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = root / "own.toml"
    config.write_text(TABLE.format(extracted=extracted, root=root, name=name) + more)
    fine("federate", config)
    return config


def test_what_is_not_scored_is_counted_and_named(extracted: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"qid": n, "image": f"scans/{n}.png", "question": "Is it red?", "answer": "yes"}
        for n in range(500, 506)
    ]
    rows += [rows[0], rows[1] | {"qid": 1, "answer": ""}, rows[2] | {"qid": 2, "image": "gone.png"}]
    rows += [rows[3] | {"qid": 3, "image": None}, rows[4] | {"qid": 4, "question": "What? " * 3000}]
    config = own(extracted, tmp_path, "vqa", rows, 'columns = { id = "qid" }\n')
    output = fine("evaluate", config, "--benchmark", "own")
    for told in (
        "own: 1 missing images not scored",
        "gone.png",
        "own: 1 duplicate ids not scored",
        "own: 2 bad entries not scored",
        "own.jsonl:8: 'answer' is empty",
        "own.jsonl:10, 'image': no image",
        "own: 1 failed items not scored",
    ):
        assert told in output
    content = json.loads((tmp_path / "build/scores/study/own/own.json").read_text())
    assert content["counts"]["items"] == 6
    fine("report", config, "--set", "evaluate.benchmarks.loss.name=heldout_loss")


def test_classes_are_weighed_by_the_llms_own_losses(extracted: Path, llama_dir: Path, tmp_path: Path) -> None:
    import torch

    from fedcmp.pipeline.cache import FeatureCache
    from fedcmp.pipeline.models.language import FrozenLanguageModel
    from fedcmp.pipeline.models.projector import load_projector
    from fedcmp.pipeline.models.prompts import question, tokenise
    from fedcmp.pipeline.records import Text, Turn

    rows = [{"image": f"scans/{500 + n}.png", "label": ("a red star", "a ring")[n % 2]} for n in range(8)]
    config = own(extracted, tmp_path, "classify", rows, "max_new_tokens = 1\n")
    fine("evaluate", config, "--benchmark", "own")
    (path,) = (tmp_path / "build/scores/study/own/answers").glob("projector.*.jsonl")
    said = {row["id"]: row["answer"] for row in map(json.loads, path.read_text().splitlines()[1:])}
    assert len(said) == 8
    language = FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")
    projector, _ = load_projector(tmp_path / "build/runs/study/own/projector.safetensors")
    cache = FeatureCache(extracted.parent / "features/heldout.zarr")
    asked = question("What does the image show?\nAnswer the question using a single word or phrase.")
    for number in range(8):
        projected = projector(cache.tensor([cache.ids.index(rows[number]["image"])]).float())
        for loss, name in zip(said[str(number)], ("a red star", "a ring"), strict=True):
            text = Text((*asked.turns, Turn("assistant", name)))
            sample = tokenise(text, "chat", language.tokenizer, patches=4, max_length=999)
            with torch.no_grad():
                losses, _ = language.token_losses(*language.collate([sample]), projected)
            assert loss == pytest.approx(float(losses.sum()), abs=1e-3)
    only = ("--benchmark", "own", "--set")
    assert "nothing to answer" in fine("evaluate", config, *only, "evaluate.benchmarks.own.per_byte=true")
    content = json.loads((tmp_path / "build/scores/study/own/own.json").read_text())
    assert content["settings"] == {"likelihood": "per byte"}
    assert {"accuracy", "macro F1", "AUROC"} <= content["metrics"].keys()
    names = f'{{ "a red star" = "{"a " * 900}", "a ring" = "ring" }}'
    message = refused("evaluate", config, *only, f"evaluate.benchmarks.own.classes={names}")
    assert "no question could be answered" in message
    assert "its prompt has more than" in message


def test_reports_of_one_kind_are_told(extracted: Path, tmp_path: Path) -> None:
    """Where every picture gets the same answer, a good BLEU says nothing."""
    rows = [{"image": f"scans/{500 + n % 12}.png", "caption": f"no finding {n}"} for n in range(24)]
    config = own(extracted, tmp_path, "caption_table", rows, "max_new_tokens = 5\n")
    prompt = ["--set", 'evaluate.benchmarks.own.prompt="Write the findings."']
    message = refused("evaluate", config, "--benchmark", "own", *prompt)
    assert "evaluate.benchmarks.own.prompt: language.template = 'plain' shows the picture alone" in message
    output = fine("evaluate", config, "--benchmark", "own")
    assert "distinct answers among 12 (" in output
    benchmark = build("caption_table", tmp_path / "own.jsonl")
    counts, warning = benchmark.remarks(["no acute finding"] * 39 + ["effusion"])
    assert counts == {"distinct answers": 2}
    assert "only 2 different captions of 40" in str(warning)
    assert benchmark.remarks(["no acute finding"] * 19)[1] is None


def test_an_area_is_not_divided_by_folders(extracted: Path, tmp_path: Path) -> None:
    """Its parts compare each item with all others, so some of the items have no area of their own in them."""
    rows = []
    for n in range(8):
        name = f"{('a', 'b')[n % 2]}/{n}.png"
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(picture(n))
        rows.append({"image": name, "label": ("star", "ring")[n // 4]})
    more = f'images = "{tmp_path}/images"\n'
    config = own(extracted, tmp_path, "classify", rows, more)
    config.write_text(config.read_text().replace('silo = "heldout"\n', ""))
    features = tmp_path / "features"
    features.mkdir()
    for silo in ("clinic", "lab", "heldout"):
        (features / f"{silo}.zarr").symlink_to(extracted.parent / f"features/{silo}.zarr")
    words = ("--set", f"features={features}")
    fine("extract", config, "--benchmark", "own", *words)
    fine("evaluate", config, *words)
    experiment = load(config, [f"features={features}"])
    runs, _ = judged_runs([experiment])
    by_folder = [each.column for each in grouped(runs) if each.what == "folder of the images"]
    assert [column for column in by_folder if column[0] == "own"] == [
        ("own", "accuracy"),
        ("own", "macro F1"),
    ]
    metrics = [Metric([], np.zeros((0, 1)), macro_auroc, divisible=False)]
    assert not pooled(metrics).divisible
