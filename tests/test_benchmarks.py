"""One contract for every benchmark, and each from official files to scores with the tiny models."""

from __future__ import annotations

import io
import json
import re
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from official import WRITERS

from fedcmp.evaluate.benchmarks.base import BENCHMARKS, LETTER, SHORT_ANSWER, Benchmark, Item
from fedcmp.evaluate.official.files import Problem
from fedcmp.evaluate.scoring import rules_of
from fedcmp.evaluate.statistics import interval, value_of
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.prompts import question
from fedcmp.pipeline.options import Component

FILES = sorted(WRITERS)
LONG = "word " * 1000


def build(name: str, root: Path) -> Benchmark:
    options = WRITERS[name](root)
    return BENCHMARKS.build(Component.model_validate({"name": name, **options}), name)


def items_of(benchmark: Benchmark) -> list[Item]:
    found = benchmark.items(None)
    assert not [each for each in found if isinstance(each, Problem)]
    return [each for each in found if isinstance(each, Item)]


def replies(benchmark: Benchmark, items: list[Item], text: str | None) -> dict[str, Any]:
    """The same answer to everything, or with None the references."""
    if benchmark.mode == "retrieve":
        rank = 0.0 if text is None else float(len(items))
        return {each.id: [rank] * (1 + len(each.truth)) for each in items}
    if benchmark.mode == "weigh":
        # Losses of the classes: that of the right one is the least, or the greatest.
        best = 0.0 if text is None else 2.0
        return {
            each.id: [best if name == each.truth["label"] else 1.0 for name in each.options] for each in items
        }
    return {each.id: benchmark.show_reference(each) if text is None else text for each in items}


def values(benchmark: Benchmark, items: list[Item], text: str | None) -> dict[str, float]:
    metrics = benchmark.score(items, replies(benchmark, items, text))
    found = {name: value_of(metric) for name, metric in metrics.items()}
    for metric in metrics.values():
        score = interval(metric, np.random.default_rng(0), 100)
        assert score.low <= score.high
    assert all(np.isfinite(list(found.values())))
    return found


def test_every_benchmark_has_official_files_here() -> None:
    assert {*FILES, "heldout_loss"} == set(BENCHMARKS.names())


@pytest.mark.parametrize("name", FILES)
class TestContract:
    def test_items_are_the_same_each_time_and_name_pictures_that_are_there(
        self, name: str, tmp_path: Path
    ) -> None:
        benchmark = build(name, tmp_path)
        items = items_of(benchmark)
        assert items
        assert items == benchmark.items(None)
        assert len({each.id for each in items}) == len(items)
        assert benchmark.images is not None
        benchmark.unpack(benchmark.images)
        for each in items:
            assert (benchmark.images / each.image).is_file()
            assert each.text.turns[0].content.startswith("<image>\n")
            assert len(each.text.turns) == 1
        assert isinstance(benchmark.version, int)

    def test_references_score_best_and_nothing_crashes(self, name: str, tmp_path: Path) -> None:
        benchmark = build(name, tmp_path)
        items = items_of(benchmark)
        best = values(benchmark, items, None)
        assert bool(best) == (name != "mm_vet")
        for text in ("", "No", "no", "Z", LONG, "\u2028\x00'\"", "." * 50):
            worse = values(benchmark, items, text)
            assert worse.keys() == best.keys()
            for headline in benchmark.headlines:
                if headline in best:
                    assert worse[headline] <= best[headline]
        for headline in benchmark.headlines:
            if headline in best:
                assert best[headline] > 0.8

    def test_points_are_shares_and_add_up(self, name: str, tmp_path: Path) -> None:
        benchmark = build(name, tmp_path)
        items = items_of(benchmark)
        for text in (None, "", "A", LONG):
            points = benchmark.points(items, replies(benchmark, items, text))
            if points is None:
                assert name in ("mm_vet", "captions", "caption_table", "retrieval")
                continue
            assert len(points) == len(items)
            assert all(0 <= point <= 1 for point in points)
            if name not in ("mme", "mmbench"):
                accuracy = values(benchmark, items, text)["accuracy"]
                assert accuracy == pytest.approx(np.mean(points))

    def test_an_entry_out_of_form_is_a_problem_and_stops_no_other(self, name: str, tmp_path: Path) -> None:
        """Break one line or entry of every file that lists questions."""
        benchmark = build(name, tmp_path)
        number = len(items_of(benchmark))
        path = broken(name, tmp_path)
        found = benchmark.items(None)
        problems = [each for each in found if isinstance(each, Problem)]
        assert len(problems) == 1
        assert str(path) in problems[0].reason or name in problems[0].reason
        assert 0 < len(found) - len(problems) < number + 1

    @pytest.mark.parametrize(
        "content", ["[]", "{}", "null", "3", '"x"', "[null]", '{"a": null}', "[[1]]", ""]
    )
    def test_a_file_of_another_form_is_one_clear_error(self, name: str, content: str, tmp_path: Path) -> None:
        """Whichever file it is: a `UserError` or problems, never another exception."""
        benchmark = build(name, tmp_path)
        whole = len(items_of(benchmark))
        for path in sorted([*tmp_path.glob("*.json"), *tmp_path.glob("*.tsv"), *tmp_path.glob("*/*.txt")]):
            before = path.read_bytes()
            path.write_text(content)
            with suppress(UserError):
                found = benchmark.items(None)
                assert len([each for each in found if isinstance(each, Item)]) <= whole
            path.write_bytes(before)
        assert len(items_of(benchmark)) == whole

    @pytest.mark.parametrize("value", [None, 3, [], {}, "\udcff"])
    def test_a_field_of_another_type_stops_no_other_entry(
        self, name: str, value: Any, tmp_path: Path
    ) -> None:
        """Every field of the first entry of every list, in turn."""
        benchmark = build(name, tmp_path)
        whole = len(items_of(benchmark))
        for path in sorted(tmp_path.glob("*.json")):
            before = path.read_text()
            if name == "pope":
                first, _, rest = before.partition("\n")
                changed = [json.dumps(each) + "\n" + rest for each in spoilt(json.loads(first), value)]
            else:
                changed = [json.dumps(each) for each in spoilt_first(json.loads(before), value)]
            for text in changed:
                path.write_text(text)
                items = [each for each in benchmark.items(None) if isinstance(each, Item)]
                assert len(items) >= whole - 4
                values(benchmark, items, "x")
            path.write_text(before)


def spoilt(entry: dict[str, Any], value: Any) -> list[dict[str, Any]]:
    return [entry | {key: value} for key in entry]


def spoilt_first(content: Any, value: Any) -> list[Any]:
    """Copies of a file in which one field of the first entry of one list or table has another value."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return [[each, *content[1:]] for each in spoilt(content[0], value)]
    found = []
    for key, inner in content.items() if isinstance(content, dict) else ():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict):
            found += [content | {key: each} for each in spoilt_first(inner, value)]
    if isinstance(content, dict) and content and all(isinstance(each, dict) for each in content.values()):
        first = next(iter(content))
        found += [content | {first: each} for each in spoilt(content[first], value)]
    return found


def broken(name: str, root: Path) -> Path:
    """Damage one entry of a benchmark's file."""
    if name == "mme":
        path = root / "color/0000.txt"
        path.write_bytes(b"\xff\xfe is it?\tYes\nIs it?\tNo\n")
        return path
    if name == "pope":
        path = root / "coco_pope_random.json"
        rows = path.read_bytes().split(b"\n")
        path.write_bytes(b"\n".join([rows[0], b'{"text": "\xff"}', *rows[2:]]))
        return path
    if name == "mmbench":
        path = root / "mmbench_dev.tsv"
        path.write_text(path.read_text() + "nonsense\n")
        return path
    (path,) = [
        file
        for file in root.glob("*.json")
        if re.search(r"mm-vet|SEED|CQM|TextVQA_0\.5|questions|^val|dataset", file.name)
    ]
    content = json.loads(path.read_text())
    if name in ("mm_vet", "gqa"):
        content[next(iter(content))] = {"isBalanced": True}
    else:
        listed = (
            content if isinstance(content, list) else next(v for v in content.values() if isinstance(v, list))
        )
        listed[-1 if name == "scienceqa" else 0] = {"id": "1", "image": "x", "split": "test"}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("encoding", "readable"), [("utf-8-sig", True), ("utf-16", False), ("latin-1", False)]
)
def test_other_encodings_are_read_or_refused_by_name(tmp_path: Path, encoding: str, readable: bool) -> None:
    for name, file in (("vqav2", "questions.json"), ("mmbench", "mmbench_dev.tsv")):
        (tmp_path / name).mkdir()
        benchmark = build(name, tmp_path / name)
        before, path = benchmark.items(None), tmp_path / name / file
        text = path.read_text().replace("red", "r\u00e9d")
        path.write_bytes(text.encode(encoding))
        if readable:
            assert len(benchmark.items(None)) == len(before)
        else:
            with pytest.raises(UserError, match=f"{file}: .* is not UTF-8"):
                benchmark.items(None)


@pytest.mark.parametrize("name", ["gqa", "textvqa", "vqav2"])
def test_names_that_no_id_fits_are_told(name: str, tmp_path: Path) -> None:
    options = WRITERS[name](tmp_path) | {"image_name": "{number}.jpg"}
    benchmark = BENCHMARKS.build(Component.model_validate({"name": name, **options}), name)
    problems = [each.reason for each in benchmark.items(None) if isinstance(each, Problem)]
    assert problems[0].startswith("image_name = '{number}.jpg' does not fit image id ")


def test_an_annotation_without_its_question_stops_no_other(tmp_path: Path) -> None:
    benchmark = build("vqav2", tmp_path)
    path = tmp_path / "annotations.json"
    content = json.loads(path.read_text())
    del content["annotations"][0]["question_id"]
    path.write_text(json.dumps(content))
    first, second, *rest = benchmark.items(None)
    assert isinstance(first, Problem)
    assert first.reason.endswith("[0]: no field 'question_id'; is this the official file?")
    assert isinstance(second, Problem)
    assert second.reason.endswith("no annotation for question_id 0")
    assert all(isinstance(each, Item) for each in rest)


def test_an_open_quote_in_a_table_is_no_short_table(tmp_path: Path) -> None:
    benchmark = build("mmbench", tmp_path)
    path = tmp_path / "mmbench_dev.tsv"
    path.write_text(path.read_text().replace("What is it?", '"What is it?', 1))
    with pytest.raises(UserError, match="not a table of tabs and quotes"):
        benchmark.items(None)


def test_extra_and_missing_lines_are_reported(tmp_path: Path) -> None:
    benchmark = build("mme", tmp_path)
    number = len(items_of(benchmark))
    (tmp_path / "color/0000.txt").write_text("Is this a dog?\tYes\n")
    (tmp_path / "color/0001.txt").write_text("Is it?\tYes\r\nIs it not?\tNo\r\nIs it so?\tNo\r\n\r\n")
    found = benchmark.items(None)
    problems = [each.reason for each in found if isinstance(each, Problem)]
    assert [reason.rpartition("/")[2] for reason in problems] == [
        "0000.txt: 1 questions about an image, not 2",
        "0001.txt: 3 questions about an image, not 2",
    ]
    items = [each for each in found if isinstance(each, Item)]
    assert len(items) == number - 1
    metrics = benchmark.score(items, {each.id: each.truth for each in items})
    assert value_of(metrics["color"]) == 150  # one question alone is not both


PROMPTS = {
    "pope": "Is there a dog in the image?" + SHORT_ANSWER,
    "mme": "Is this a dog?" + SHORT_ANSWER,
    "mmbench": "What is it?\nA. a red bus\nB. a blue car" + LETTER,
    "mm_vet": "What is x in the equation?",
    "seed_bench": "What is it?\nA. dog\nB. cat\nC. ox\nD. hen" + LETTER,
    "scienceqa": "Is it 1?\nA. yes\nB. no\nC. maybe" + LETTER,
    "textvqa": "What brand is it?" + SHORT_ANSWER,
    "vqav2": "Is it red?" + SHORT_ANSWER,
    "gqa": "Is it red?" + SHORT_ANSWER,
    "vizwiz": "What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    + SHORT_ANSWER,
    "captions": "Provide a one-sentence caption for the provided image.",
}


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_prompts(name: str, tmp_path: Path) -> None:
    item, *_ = items_of(build(name, tmp_path))
    assert item.text.turns[0].content == "<image>\n" + PROMPTS[name]


def test_hints_and_ocr_tokens_are_part_of_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "mmbench").mkdir()
    mmbench = items_of(build("mmbench", tmp_path / "mmbench"))
    assert "\nthe picture shows a street\nWhat is it?\nA. " in mmbench[-1].text.turns[0].content
    (tmp_path / "textvqa").mkdir()
    textvqa = items_of(build("textvqa", tmp_path / "textvqa"))
    asked = textvqa[1].text.turns[0].content
    assert asked == "<image>\nWhat brand is it?\nReference OCR token: NOKIA, 3310" + SHORT_ANSWER


def test_textvqa_takes_llavas_prompts_by_image_and_question(tmp_path: Path) -> None:
    options = WRITERS["textvqa"](tmp_path)
    annotations = json.loads(options["annotations"].read_text())["data"]
    prompt = "WHAT brand is it?\nReference OCR token: A, B" + SHORT_ANSWER
    rows = [{"question_id": entry["image_id"], "image": "x", "text": prompt} for entry in annotations[1:]]
    questions = tmp_path / "llava.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {**options, "questions": questions}
    benchmark = BENCHMARKS.build(Component.model_validate({"name": "textvqa", **options}), "t")
    problem, *items = benchmark.items(None)
    assert isinstance(problem, Problem)
    assert "no prompt for 'What brand is it?'" in problem.reason
    assert all(isinstance(each, Item) and each.text.turns[0].content.endswith(prompt) for each in items)
    assert benchmark.settings == {"OCR": "as in llava.jsonl"}


def test_submissions_are_in_the_official_form(tmp_path: Path) -> None:
    found = {}
    for name in ("vqav2", "mm_vet", "mmbench", "vizwiz", "captions"):
        (tmp_path / name).mkdir()
        benchmark = build(name, tmp_path / name)
        items = items_of(benchmark)
        said = {each.id: "The Two <dogs> & \x07a cat." for each in items}
        (found[name],) = benchmark.submissions(items, said).values()
    assert json.loads(found["vqav2"])[1] == {"question_id": 1000, "answer": "2 dogs & \x07a cat"}
    assert json.loads(found["mm_vet"])["v1_0"] == "The Two <dogs> & \x07a cat."
    assert json.loads(found["vizwiz"])[0]["image"] == "VizWiz_val_00000000.jpg"
    assert json.loads(found["captions"])[0] == {"image_id": 0, "caption": "The Two <dogs> & \x07a cat."}
    with zipfile.ZipFile(io.BytesIO(found["mmbench"])) as file:
        assert file.testzip() is None
        sheet = file.read("xl/worksheets/sheet1.xml").decode()
    assert sheet.count("<row>") == 1 + 2 * 2 + 2 * 4
    assert "The Two &lt;dogs&gt; &amp; a cat." in sheet
    assert "<v>1000000</v>" in sheet


def test_files_without_references_give_submissions_only(tmp_path: Path) -> None:
    for name in ("vqav2", "vizwiz", "mmbench"):
        (tmp_path / name).mkdir()
        options = WRITERS[name](tmp_path / name)
        if name == "vqav2":
            del options["annotations"]
        elif name == "vizwiz":
            path = options["annotations"]
            rows = [{"image": each["image"], "question": "?"} for each in json.loads(path.read_text())]
            path.write_text(json.dumps(rows))
        else:
            path = options["path"]
            path.write_text(re.sub(r"\t[A-D]\t(recognition|logic)\t", r"\t\t\1\t", path.read_text()))
        benchmark = BENCHMARKS.build(Component.model_validate({"name": name, **options}), name)
        items = items_of(benchmark)
        answers = {each.id: "yes" for each in items}
        assert benchmark.score(items, answers) == {}
        assert benchmark.points(items, answers) is None
        assert benchmark.submissions(items, answers)
        assert benchmark.show_reference(items[0]) == ""


def test_circular_passes_are_one_question_and_strata_keep_categories(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mmbench = build("mmbench", tmp_path / "a")
    items = items_of(mmbench)
    answers = {each.id: mmbench.show_reference(each) for each in items}
    answers["1000000"] = "hard to say"
    metrics = mmbench.score(items, answers)
    assert value_of(metrics["accuracy"]) == 0.75
    assert value_of(metrics["vanilla accuracy"]) == 1.0
    assert value_of(metrics["undecided"]) == pytest.approx(1 / 12)
    assert value_of(metrics["l2-category coarse"]) == 0.5
    (tmp_path / "b").mkdir()
    mme = build("mme", tmp_path / "b")
    items = items_of(mme)
    best = mme.score(items, {each.id: mme.show_reference(each) for each in items})
    score = interval(best["total"], np.random.default_rng(0), 500)
    assert (score.value, score.low, score.high) == (2800.0, 2800.0, 2800.0)
    seen = [each for each in items if not each.id.startswith("OCR")]
    part = mme.score(seen, {each.id: mme.show_reference(each) for each in seen})
    assert {"perception", "total"}.isdisjoint(part)
    assert value_of(part["cognition"]) == 800


# What answers of retrieval and scores are saved under, of the files in official.py: labels are hashed as the
# text that they have always been hashed as, or everything saved would count as stale.
LABELS = {
    "caption_table": "d89f02cc34867a03",
    "captions": "546592c89d2a9e3f",
    "classify": "3b66e57919ca4425",
    "gqa": "7149ac044e6fed7d",
    "mcq": "2af79fee8bd66ac5",
    "mm_vet": "b668dab2481206e7",
    "mmbench": "24fe628145dce8ea",
    "mme": "06e1bbac2651e7f3",
    "pope": "f8612dcf818e5de0",
    "retrieval": "546592c89d2a9e3f",
    "scienceqa": "b40e43194efe4c87",
    "seed_bench": "d7b2e0b19c5bfc3a",
    "textvqa": "725d5478b9e87feb",
    "vizwiz": "da655655b76db3cc",
    "vqa": "f8d684695b498b20",
    "vqav2": "d1571c23ec45c68a",
    "yes_no": "b6bb8a55b75a9887",
}


@pytest.mark.parametrize("name", FILES)
def test_labels_are_hashed_as_ever(name: str, tmp_path: Path) -> None:
    benchmark = build(name, tmp_path)
    assert rules_of(benchmark, items_of(benchmark))["labels"][:16] == LABELS[name]


def test_truth_that_differs_is_another_item_and_no_truth_is_none() -> None:
    one, same, other = (Item("1", "a.png", question("?"), {"answer": each}) for each in "AAB")
    assert one == same != other
    assert len({one, same, other}) == 2
    assert Item("1", "a.png", question("?")).label == ""
    assert Item("1", "a.png", question("?"), None).label == "null"
