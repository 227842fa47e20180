"""What docs/tables.md shows works: every TOML table there, on files in the layout of its data set."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from conftest import ROOT
from tables import NUMBER, WRITERS
from test_benchmarks import items_of
from test_scores import fine

from fedcmp.evaluate.benchmarks.base import BENCHMARKS, Benchmark, Item
from fedcmp.evaluate.statistics import value_of
from fedcmp.pipeline.options import Component

pytest.importorskip("pyarrow")

PAGE = (ROOT / "docs/tables.md").read_text()
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
TABLES: dict[str, dict[str, Any]] = {
    name: table for block in BLOCKS for name, table in tomllib.loads(block)["evaluate"]["benchmarks"].items()
}


def moved(value: Any, data: Path) -> Any:
    """Options with a folder in the place of /data."""
    if isinstance(value, dict):
        return {key: moved(each, data) for key, each in value.items()}
    is_path = isinstance(value, str) and value.startswith("/data/")
    return str(data / value.removeprefix("/data/")) if is_path else value


def test_every_data_set_has_files_here() -> None:
    assert TABLES.keys() == WRITERS.keys()


def build(name: str, data: Path, **changes: Any) -> Benchmark:
    WRITERS[name](data)
    options = moved(TABLES[name], data) | changes
    return BENCHMARKS.build(Component.model_validate(options), name)


@pytest.fixture(scope="module")
def evaluated(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has answered all of them, through the command line."""
    root = tmp_path_factory.mktemp("tables")
    (root / "features").mkdir()
    for silo in ("clinic", "lab"):
        (root / f"features/{silo}.zarr").symlink_to(extracted.parent / f"features/{silo}.zarr")
    tables = {"extends": str(extracted), "build": f"{root}/build", "features": f"{root}/features"}
    benchmarks = {}
    for name, write in WRITERS.items():
        write(root / "data")
        short = {} if "max_new_tokens" in TABLES[name] or name == "pneumonia" else {"max_new_tokens": 4}
        benchmarks[name] = moved(TABLES[name], root / "data") | short
    # Captions are asked for without words by default, and reports are not.
    tables["evaluate"] = {"benchmarks": benchmarks}
    config = root / "tables.toml"
    config.write_text(tomli_w.dumps(tables))
    words = [word for name in WRITERS for word in ("--benchmark", name)]
    fine("extract", config, *words)
    fine("federate", config)
    fine("evaluate", config, *words)
    fine("score", config, *words)
    return root


EXPECTED = {
    "vqa_rad": (2 * NUMBER, {"accuracy", "closed accuracy", "open recall", "accuracy image_organ HEAD"}),
    "slake": (
        3 * NUMBER,
        {"closed accuracy", "open F1", "accuracy modality CT", "accuracy content_type Size"},
    ),
    "pathvqa": (2 * NUMBER, {"closed accuracy", "open recall", "open F1", "open BLEU-1"}),
    "pmc_vqa": (NUMBER, {"accuracy", "undecided"}),
    "mmstar": (NUMBER, {"accuracy", "accuracy category math", "accuracy l2_category geometry"}),
    "mmstar_tsv": (NUMBER, {"accuracy", "accuracy l2-category image emotion"}),
    "ai2d": (NUMBER, {"accuracy"}),
    "realworldqa": (NUMBER, {"accuracy", "open accuracy"}),
    "hallusionbench": (6, {"accuracy", "f1", "fAcc", "qAcc", "accuracy category VS"}),
    "okvqa": (NUMBER, {"accuracy"}),
    "aokvqa": (NUMBER - 1, {"accuracy"}),
    "aokvqa_choice": (NUMBER, {"accuracy", "undecided"}),
    "nocaps": (2 * NUMBER, {"CIDEr-D", "CIDEr-D domain in-domain", "BLEU-4 domain out-domain"}),
    "reports": (NUMBER, {"CIDEr-D", "ROUGE-L"}),
    "pneumonia": (NUMBER, {"accuracy", "macro F1", "AUROC"}),
    "pope_parquet": (3 * NUMBER, {"f1", "accuracy adversarial"}),
    "mme_parquet": (56, {"total", "OCR"}),
    "mmbench_parquet": (4, {"accuracy", "vanilla accuracy", "l2-category coarse"}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_it_is_extracted_answered_and_scored(name: str, evaluated: Path) -> None:
    number, metrics = EXPECTED[name]
    content = json.loads((evaluated / f"build/scores/study/tables/{name}.json").read_text())
    assert content["counts"]["items"] == number
    assert not any(
        content["counts"][what] for what in ("missing images", "bad entries", "failed items", "duplicate ids")
    )
    assert metrics <= content["metrics"].keys()
    for score in content["metrics"].values():
        assert score["low"] <= score["value"] + 1e-9
        assert score["value"] <= score["high"] + 1e-9


def test_a_picture_in_many_rows_is_encoded_once(evaluated: Path) -> None:
    from fedcmp.pipeline.cache import FeatureCache

    for name in ("pathvqa", "mmstar_tsv", "pope_parquet", "reports"):
        cache = FeatureCache(evaluated / f"features/{name}.zarr")
        pictures = 2 if name in ("mmstar_tsv", "pope_parquet") else NUMBER
        assert len(cache.ids) == len({*map(bytes, cache.array("images/sha256"))}) == pictures


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_references_score_full_marks(name: str, tmp_path: Path) -> None:
    benchmark = build(name, tmp_path)
    items = items_of(benchmark)
    if benchmark.mode == "weigh":
        said: dict[str, Any] = {
            each.id: [float(word != each.truth["label"]) for word in each.options] for each in items
        }
    else:
        said = {each.id: benchmark.show_reference(each) for each in items}
    metrics = {name: value_of(each) for name, each in benchmark.score(items, said).items()}
    headline = next(each for each in ("total", "exact match", "accuracy") if each in metrics)
    assert metrics[headline] == pytest.approx(2800 if headline == "total" else 1)


def one(benchmark: Benchmark, number: int = 0) -> Item:
    return items_of(benchmark)[number]


def said(item: Item) -> str:
    return item.text.turns[-1].content.removeprefix("<image>\n")


def test_what_is_asked(tmp_path: Path) -> None:
    short = "\nAnswer the question using a single word or phrase."
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert said(one(build("vqa_rad", tmp_path))) == "Is there a mass?" + short
    choices = "A. Hepatocytes\nB. Renal, proximal tubules\nC. Neurons\nD. Muscle"
    assert said(one(build("pmc_vqa", tmp_path))) == f"What is shown?\n{choices}{letter}"
    first, second, third, _ = items_of(build("mmstar_tsv", tmp_path))
    assert said(first) == f'Which\tof "these"?\nA. a dog\nB. a cat\nC. an ox\nD. a hen{letter}'
    assert said(second) == f'Which\tof "these"?\nA. a dog\nB. a cat\nC. an ox{letter}'
    assert said(third).startswith("two words\nWhich")
    assert second.options == ("A", "B", "C")
    assert said(one(build("mmstar", tmp_path))).endswith(f"D: a hen{letter}")
    assert one(build("mmstar", tmp_path)).options == tuple("ABCD")
    benchmark = build("realworldqa", tmp_path)
    assert said(benchmark.worded(one(benchmark))).endswith("with only the letter of the option.")
    assert said(one(build("pneumonia", tmp_path))) == "What does this chest X-ray show?" + short
    assert one(build("pneumonia", tmp_path)).options == ("normal", "pneumonia")


def test_truths(tmp_path: Path) -> None:
    rad = items_of(build("vqa_rad", tmp_path))
    assert [each.truth["closed"] for each in rad] == [True, False] * NUMBER
    assert rad[1].truth["answers"] == ["1"]
    assert [each.id for each in rad] == [str(n) for n in range(2 * NUMBER)]
    assert [each.truth["answer"] for each in items_of(build("ai2d", tmp_path))] == list("ABCD")
    assert [each.truth["answer"] for each in items_of(build("aokvqa_choice", tmp_path))] == list("ABCD")
    hallusion = items_of(build("hallusionbench", tmp_path))
    assert [each.truth["answer"] for each in hallusion] == ["no", "yes", "yes", "no", "yes", "no"]
    assert one(build("hallusionbench", tmp_path)).image == "hallusion_bench/VD/illusion/0_0.png"
    assert one(build("aokvqa", tmp_path)).image == "000000000000.jpg"
    reports = items_of(build("reports", tmp_path))
    assert [len(each.truth["captions"]) for each in reports] == [2] * NUMBER


def test_hallusionbench_by_figure_and_by_question(tmp_path: Path) -> None:
    """By hand: the second question about VD's first figure is wrong."""
    benchmark = build("hallusionbench", tmp_path)
    items = items_of(benchmark)
    answers = {each.id: f"{each.truth['answer'].capitalize()}, it is." for each in items}
    answers[items[1].id] = "No."
    values = {name: value_of(each) for name, each in benchmark.score(items, answers).items()}
    assert values["accuracy"] == pytest.approx(5 / 6)
    assert values["fAcc"] == pytest.approx(2 / 3)  # VD's two figures and VS' second
    assert values["qAcc"] == pytest.approx(3 / 4)  # two questions of each
    assert values["accuracy category VD"] == pytest.approx(3 / 4)


def test_a_okvqa_counts_agreeing_people(tmp_path: Path) -> None:
    benchmark = build("aokvqa", tmp_path)
    items = items_of(benchmark)
    points = benchmark.points(
        items, dict(zip([each.id for each in items], ("Ship.", "boat", "the sea"), strict=True))
    )
    # "sea" and "the sea" are one answer after normalisation.
    assert points == pytest.approx([1, 2 / 3, 2 / 3])
    official = build("aokvqa", tmp_path, agreement="leave_one_out")
    assert official.points(items, {each.id: "boat" for each in items}) == pytest.approx(
        [(2 / 3 * 8 + 1 / 3 * 2) / 10] * 3
    )


def test_domains_average_to_the_whole(tmp_path: Path) -> None:
    benchmark = build("nocaps", tmp_path)
    items = items_of(benchmark)
    answers = {each.id: f"a dog number {each.id} runs" for each in items}
    metrics = benchmark.score(items, answers)
    parts = [metrics[f"CIDEr-D domain {name}-domain"] for name in ("in", "near", "out")]
    sizes = [len(each.images) for each in parts]
    assert sizes == [3, 3, 2]
    mean = np.average([value_of(each) for each in parts], weights=sizes)
    assert value_of(metrics["CIDEr-D"]) == pytest.approx(mean)
    alone = build("nocaps", tmp_path, group=None)
    assert items_of(alone)[0].truth == ["A dog number 0 runs on grass", "A hound number 0 is running"]
    assert value_of(alone.score(items_of(alone), answers)["CIDEr-D"]) == value_of(metrics["CIDEr-D"])


def test_parquet_files_ask_what_the_official_ones_ask(tmp_path: Path) -> None:
    from official import WRITERS as OFFICIAL

    for name in ("pope", "mme", "mmbench"):
        (tmp_path / name).mkdir()
        theirs = BENCHMARKS.build(
            Component.model_validate({"name": name, **OFFICIAL[name](tmp_path / name)}), name
        )
        ours = items_of(build(f"{name}_parquet", tmp_path / "data"))
        asked = {said(each) for each in ours}
        assert asked & {said(each) for each in items_of(theirs)}
    pope = items_of(build("pope_parquet", tmp_path / "data"))
    assert [each.id for each in pope[:5]] == ["random/1", "random/2", "random/3", "random/4", "popular/1"]
    mme = items_of(build("mme_parquet", tmp_path / "data"))
    assert mme[0].id == "existence/existence/0000.png#1"
    assert mme[0].image == "existence/0000.png"


def test_rows_of_mme_that_are_no_pairs_are_told(tmp_path: Path) -> None:
    from tables import parquet, struct

    benchmark = build("mme_parquet", tmp_path)
    row = {"question_id": "OCR/7.png", "image": struct(1), "question": "Is it?", "answer": "Yes"}
    parquet(tmp_path / "MME/data/test-x.parquet", [row | {"category": "OCR"}, row | {"category": "ocr"}])
    found = [each.reason for each in benchmark.items(None) if not isinstance(each, Item)]
    assert "test-x.parquet, row 2: no category of MME, or no question_id" in found[0]
    assert "1 questions about OCR/7.png in OCR, not 2" in found[1]
