"""Every case of golden.json, whose values the official code computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from fedcmp.evaluate.benchmarks.base import Answers, Item, averaged
from fedcmp.evaluate.benchmarks.captions import Captions
from fedcmp.evaluate.benchmarks.gqa import Gqa
from fedcmp.evaluate.benchmarks.mm_vet import MmVet
from fedcmp.evaluate.benchmarks.mmbench import MmBench
from fedcmp.evaluate.benchmarks.mme import Mme
from fedcmp.evaluate.benchmarks.pope import Pope
from fedcmp.evaluate.benchmarks.retrieval import Retrieval, ranks_of
from fedcmp.evaluate.benchmarks.scienceqa import ScienceQa
from fedcmp.evaluate.benchmarks.seed_bench import SeedBench
from fedcmp.evaluate.metric import Metric
from fedcmp.evaluate.official.captions import bleu, bleu_score, cider_d, rouge_l
from fedcmp.evaluate.official.ptb import caption_tokens
from fedcmp.evaluate.official.short_answers import (
    evalai_normalise,
    gqa_answer,
    mmbench_option,
    mme_label,
    pope_label,
    scienceqa_letter,
    textvqa_accuracy,
    vizwiz_accuracy,
    vqa_accuracy,
    vqa_normalise,
)
from fedcmp.evaluate.statistics import bootstrap, mcnemar, value_of
from fedcmp.pipeline.models.prompts import question

CASES = json.loads((ROOT / "tests/golden.json").read_text())["cases"]
NOWHERE = Path("unused")
LLAVA = "llava_pipeline_accuracy_percent (EvalAIAnswerProcessor on the prediction, then the official code)"

Case = Mapping[str, Any]
CHECKS: dict[str, Callable[[Case, Path], None]] = {}


def check(benchmark: str) -> Callable[..., Any]:
    def add(function: Callable[[Case, Path], None]) -> Callable[[Case, Path], None]:
        CHECKS[benchmark] = function
        return function

    return add


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_golden(case: Case, tmp_path: Path) -> None:
    CHECKS[case["benchmark"]](case, tmp_path)


def test_no_case_is_left_out() -> None:
    assert len(CASES) == 77
    assert {case["benchmark"] for case in CASES} == CHECKS.keys()


def item(name: str, truth: Any, image: str = "a.png") -> Item:
    return Item(name, image, question("?"), truth)


def near(metrics: Mapping[str, Metric], name: str, expected: float) -> None:
    assert value_of(metrics[name]) == pytest.approx(expected, abs=1e-6), name


@check("pope_parse")
def pope_parse(case: Case, tmp_path: Path) -> None:
    assert pope_label(case["input"]["text"]) == case["expected"]["label"]


@check("pope_metrics")
def pope_metrics(case: Case, tmp_path: Path) -> None:
    items = [item(f"random/{n}", label) for n, label in enumerate(case["input"]["labels"])]
    answers = {each.id: text for each, text in zip(items, case["input"]["texts"], strict=True)}
    metrics = Pope(questions={"random": NOWHERE}).score(items, answers)
    for ours, theirs in (
        ("accuracy", "acc"),
        ("f1", "f1"),
        ("accuracy random", "acc"),
        ("precision random", "precision"),
        ("recall random", "recall"),
        ("f1 random", "f1"),
        ("yes ratio random", "yes_ratio"),
    ):
        near(metrics, ours, case["expected"][theirs])


@check("mme_parse")
def mme_parse(case: Case, tmp_path: Path) -> None:
    assert mme_label(case["input"]["text"]) == case["expected"]["label"]


@check("mme_total")
def mme_total(case: Case, tmp_path: Path) -> None:
    """Through files in the official form, read and scored."""
    given, expected = case["input"], case["expected"]
    rows = given.get("rows_image_question_gt_pred") or {
        category: [
            [f"{n}.jpg", f"Is it {gt}? Please answer yes or no.", gt, gt]
            for n in range(3)
            for gt in ("Yes", "No")
        ]
        for category in expected["per_category"]
    }
    answers: dict[str, str] = {}
    for category, lines in rows.items():
        nested = category in ("artwork", "celebrity", "landmark", "posters", "scene")
        folder = tmp_path / category / "questions_answers_YN" if nested else tmp_path / category
        folder.mkdir(parents=True)
        for number, (image, asked, truth, said) in enumerate(lines):
            with (folder / f"{Path(image).stem}.txt").open("a") as file:
                file.write(f"{asked}\t{truth}\n")
            place = f"{category}/images/{image}" if nested else f"{category}/{image}"
            answers[f"{category}/{place}#{number % 2 + 1}"] = said
    benchmark = Mme(path=tmp_path)
    items = [each for each in benchmark.items(None) if isinstance(each, Item)]
    assert {each.id for each in items} == answers.keys()
    assert "Please answer" not in items[0].text.turns[0].content
    metrics = benchmark.score(items, answers)
    near(metrics, "perception", expected["perception"])
    near(metrics, "cognition", expected["cognition"])
    near(metrics, "total", expected["perception"] + expected["cognition"])
    for category, value in expected["per_category"].items():
        near(metrics, category, value)


@check("mmbench_extract")
def mmbench_extract(case: Case, tmp_path: Path) -> None:
    assert mmbench_option(case["input"]["prediction"], case["input"]["choices"]) == case["expected"]["option"]


@check("mmbench_circular")
def mmbench_circular(case: Case, tmp_path: Path) -> None:
    items, answers = [], {}
    for each in case["input"]["passes"]:
        choices = {letter: each[letter] for letter in "ABCD"}
        truth = {"answer": each["GT"], "choices": choices, "category": "c", "l2-category": "l"}
        items.append(item(str(each["index"]), truth))
        answers[str(each["index"])] = each["prediction"]
    near(MmBench(path=NOWHERE).score(items, answers), "accuracy", case["expected"]["hit"])


@check("mmvet_aggregate")
def mmvet_aggregate(case: Case, tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    questions, grades = tmp_path / "mm-vet.json", tmp_path / "grades.json"
    questions.write_text(json.dumps(given["questions"]))
    grades.write_text(json.dumps({k: {"score": v} for k, v in given["judge_scores_per_run"].items()}))
    benchmark = MmVet(path=questions, grades=grades)
    items = [each for each in benchmark.items(None) if isinstance(each, Item)]
    metrics = benchmark.score(items, {})
    values = {name: round(value_of(metric), 1) for name, metric in metrics.items()}
    assert (values["total"], values["spread over judge runs"]) == (53.8, 6.2)
    for name, value in expected["capability"].items():
        assert name in ("total", "std") or values[f"capability {name}"] == value
    for name, value in expected["integration (names sorted here)"].items():
        assert name in ("total", "std") or values[f"integration {name}"] == value


@check("seed")
def seed(case: Case, tmp_path: Path) -> None:
    names = {1: "Scene Understanding", 2: "Instance Identity", 10: "Action Recognition"}
    rows = case["input"]["items_id_answer_text_datatype_typeid"]
    items = [item(n, {"answer": truth, "type": names[kind]}) for n, truth, _, _, kind in rows]
    metrics = SeedBench(path=NOWHERE).score(items, {n: said for n, _, said, _, _ in rows})
    printed = [f"{names[kind]}: {100 * value_of(metrics[f'accuracy {names[kind]}']):.2f}%" for kind in names]
    printed.append(f"Total accuracy: {100 * value_of(metrics['accuracy']):.2f}%")
    for kind, wanted in (("image", items[:4]), ("video", items[4:])):
        accuracy = SeedBench(path=NOWHERE).score(wanted, {n: said for n, _, said, _, _ in rows})["accuracy"]
        printed.append(f"{kind} accuracy: {100 * value_of(accuracy):.2f}%")
    assert printed == case["expected"]["printed"]


@check("scienceqa")
def scienceqa(case: Case, tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    assert (scienceqa_letter(given["text"]) or "FAILED") == expected["parsed"]
    each = item("1", {"answer": given["answer_index"], "choices": given["num_choices"], "subject": "s"})
    points = benchmark_points(ScienceQa, [each], {"1": given["text"]})
    assert points == [float(expected["correct"])]


def benchmark_points(benchmark: type[ScienceQa], items: Sequence[Item], answers: Answers) -> list[float]:
    return benchmark(problems=NOWHERE, splits=NOWHERE, questions=NOWHERE).points(items, answers)


@check("scienceqa_total")
def scienceqa_total(case: Case, tmp_path: Path) -> None:
    """The official total is over twelve answers of which six are given here; the rest is made to fit."""
    given = [case["input"] for case in CASES if case["benchmark"] == "scienceqa"]
    answers = [(each["text"], each["answer_index"], each["has_image_in_prompt"]) for each in given]
    answers += [("A", 0, True), ("B. a dog", 1, True), ("The answer is C.", 2, True), ("D", 3, True)]
    answers += [("The answer is A. The answer is B.", 0, True), ("E. ", 0, False), ("FAILED", 0, False)]
    items = [
        item(str(n), {"answer": index, "choices": 4, "subject": "s"})
        for n, (_, index, _) in enumerate(answers)
    ]
    said = {str(n): text for n, (text, _, _) in enumerate(answers)}
    points = benchmark_points(ScienceQa, items, said)
    assert (len(points), sum(points)) == (case["expected"]["count"], case["expected"]["correct"])
    assert 100 * np.mean(points) == pytest.approx(case["expected"]["acc"])
    with_image = [point for point, (_, _, image) in zip(points, answers, strict=True) if image]
    assert f"IMG-Accuracy: {100 * np.mean(with_image):.2f}%" in case["expected"]["printed"]


@check("textvqa")
def textvqa(case: Case, tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    assert evalai_normalise(given["prediction"]) == expected["normalised_prediction"]
    assert textvqa_accuracy(given["prediction"], given["answers"]) == pytest.approx(expected["accuracy"])


@check("vqav2")
def vqav2(case: Case, tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    assert vqa_normalise(given["prediction"]) == expected["normalised_prediction_if_normalised"]
    for normalise_first, key in ((False, "accuracy_percent"), (True, LLAVA)):
        accuracy = vqa_accuracy(
            given["prediction"],
            given["answers"],
            normalise_first=normalise_first,
            numbered=given["answers_have_answer_id"],
        )
        assert 100 * accuracy == pytest.approx(expected[key], abs=1e-6)


@check("vizwiz")
def vizwiz(case: Case, tmp_path: Path) -> None:
    accuracy = vizwiz_accuracy(case["input"]["prediction"], case["input"]["answers"])
    assert 100 * accuracy == pytest.approx(case["expected"]["accuracy_percent"])


@check("gqa")
def gqa(case: Case, tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    assert gqa_answer(given["text"]) == expected["converted"]
    each = item("1", {"answer": given["answer"], "type": given["structural_type"]})
    assert Gqa(questions=NOWHERE).points([each], {"1": given["text"]}) == [float(expected["correct"])]


@check("gqa_total")
def gqa_total(case: Case, tmp_path: Path) -> None:
    """The official total is over nine answers of which five are given here; the rest is made to fit."""
    rows = [case["input"] for case in CASES if case["benchmark"] == "gqa"]
    rows += [{"text": "Yes, it is", "answer": "yes", "structural_type": "verify"}] * 2
    rows += [{"text": text, "answer": "dog", "structural_type": "query"} for text in ("dog", "a dog")]
    items = [item(str(n), {"answer": r["answer"], "type": r["structural_type"]}) for n, r in enumerate(rows)]
    metrics = Gqa(questions=NOWHERE).score(items, {str(n): r["text"] for n, r in enumerate(rows)})
    for name, value in case["expected"].items():
        assert 100 * value_of(metrics[name]) == pytest.approx(value, abs=1e-6)


@check("caption_tokenizer")
def caption_tokenizer(case: Case, tmp_path: Path) -> None:
    assert " ".join(caption_tokens(case["input"]["caption"])) == case["expected"]["tokens"]


@check("caption_scores")
def caption_scores(case: Case, tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    tokens = caption_tokens if given["ptb_tokenised"] else str.split
    images = sorted(given["predictions"])
    said = [tokens(given["predictions"][image]) for image in images]
    references = [[tokens(text) for text in given["references"][image]] for image in images]
    ciders, ngrams = cider_d(said, references), bleu(said, references)
    rouges = list(map(rouge_l, said, references))
    np.testing.assert_allclose(
        [bleu_score(ngrams.sum(0), size) for size in range(1, 5)], expected["Bleu"], atol=1e-6, rtol=2e-3
    )
    assert ciders.mean() == pytest.approx(expected["CIDEr"], abs=1e-6)
    assert np.mean(rouges) == pytest.approx(expected["ROUGE_L"], abs=1e-6)
    for place, image in enumerate(images):
        one = expected["per_image"][image]
        assert ciders[place] == pytest.approx(one["CIDEr"], abs=1e-6)
        assert rouges[place] == pytest.approx(one["ROUGE_L"], abs=1e-6)
        assert bleu_score(ngrams[place], 4) == pytest.approx(one["Bleu_4"], abs=1e-6)
    if given["ptb_tokenised"]:
        items = [item(image, given["references"][image], image) for image in images]
        metrics = Captions(annotations=NOWHERE).score(items, given["predictions"])
        near(metrics, "CIDEr-D", expected["CIDEr"])
        near(metrics, "ROUGE-L", expected["ROUGE_L"])


@check("retrieval")
def retrieval(case: Case, tmp_path: Path) -> None:
    scores = np.array(case["input"]["scores_text_by_image"])
    owners = case["input"]["text_to_image_index"]
    ranks = ranks_of(scores, owners)
    for k in (1, 2, 5):
        found = [rank < k for _, *own in ranks for rank in own]
        assert np.mean(found) == pytest.approx(case["expected"][f"t2i_R@{k}"], abs=1e-6)
        hits = [best < k for best, *_ in ranks]
        assert np.mean(hits) == pytest.approx(case["expected"][f"i2t_R@{k}"], abs=1e-6)
    items = [item(str(n), [], str(n)) for n in range(len(ranks))]
    metrics = Retrieval(annotations=NOWHERE).score(items, {str(n): own for n, own in enumerate(ranks)})
    near(metrics, "text to image R@1", case["expected"]["t2i_R@1"])
    near(metrics, "image to text R@5", case["expected"]["i2t_R@5"])


@check("statistics")
def statistics(case: Case, tmp_path: Path) -> None:
    given, expected = case["input"], case["expected"]
    if "mcnemar_exact_p" in expected:
        assert mcnemar(given["scores_a"], given["scores_b"]) == pytest.approx(expected["mcnemar_exact_p"])
        return
    # The bootstrap over images must spread as the clustered standard error says (Miller, 2024), and with
    # every question an image of its own as the plain one. Both expected values divide the questions' own
    # variance by n - 1, which a bootstrap divides by n.
    number = len(given["scores"])
    correction = expected["stderr_naive"] ** 2 / number
    for images, expected_error in (
        ([str(name) for name in given["cluster"]], expected["stderr_clustered"]),
        ([str(n) for n in range(number)], expected["stderr_naive"]),
    ):
        error = np.sqrt(expected_error**2 - correction)
        metric = averaged([], given["scores"], images)
        spread = bootstrap([metric], np.random.default_rng(0), 200_000).std()
        assert spread == pytest.approx(error, rel=0.01)
