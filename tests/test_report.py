"""The report of small runs, through the command line: its figures are those of answers and manifests."""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import write_llava

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.evaluate.compare import compare_runs
from fedcmp.pipeline.hashes import fingerprint

BASE = """
extends = "{extracted}"
build = "{root}/build"
features = "{root}/features"
evaluate.bootstrap = 100

[extract.silos]
north = {{ name = "llava_json", path = "{root}/north/pairs.json", images = "{root}/north", split = "test" }}
south = {{ name = "llava_json", path = "{root}/south/pairs.json", images = "{root}/south", split = "test" }}

[evaluate.benchmarks]
both = {{ name = "heldout_loss", silo = "both" }}
north = {{ name = "heldout_loss", silo = "north" }}
"""
RUNS = {"one": "seed = 1", "two_b": "seed = 2", "alone": '[federate.strategy]\nname = "local_only"'}


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [*map(str, words)])


def fine(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def made(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three evaluated runs; a benchmark asks about two silos' images, in a folder each."""
    root = tmp_path_factory.mktemp("report")
    shutil.copytree(extracted.parent / "features", root / "features")
    (root / "base.toml").write_text(BASE.format(extracted=extracted, root=root))
    for number, silo in enumerate(("north", "south")):
        write_llava(root / silo, 6, first=700 + 10 * number)
    fine("extract", root / "base.toml", "--silo", "north", "--silo", "south")
    caches = [root / f"features/{silo}.zarr" for silo in ("north", "south")]
    fine("cache", "merge", *caches, "--out", root / "features/both.zarr", "--prefix")
    for name, text in RUNS.items():
        (root / f"{name}.toml").write_text(f'extends = "base.toml"\n{text}\n')
        fine("federate", root / f"{name}.toml")
        fine("evaluate", root / f"{name}.toml")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "work")
    for path in (tmp_path / "work").glob("*.toml"):
        path.write_text(path.read_text().replace(str(made), str(tmp_path / "work")))
    return tmp_path / "work"


def configs(place: Path) -> list[Path]:
    return [place / f"{name}.toml" for name in RUNS]


def out(place: Path) -> Path:
    return place / "build/report/study"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def scores(place: Path, run: str, benchmark: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / f"build/scores/study/{run}/{benchmark}.json").read_text())
    return content["metrics"]


def test_differences_are_those_of_compare(place: Path) -> None:
    fine("report", *configs(place), "--baseline", "two_b")
    told = rows(out(place) / "comparison.csv")
    assert {row["run"] for row in told} == {"one", "alone"}
    assert {row["baseline"] for row in told} == {"two_b"}
    expected = compare_runs([load(place / "one.toml", ()), load(place / "two_b.toml", ())], ())
    ours = [row for row in told if row["run"] == "one"]
    assert len(ours) == len(expected)
    for row, each in zip(ours, expected, strict=True):
        assert f"{row['benchmark']}: {row['metric']}" == each.metric
        for name, value in (("difference", each.gap.value), ("low", each.gap.low), ("p", each.gap.p)):
            assert float(row[name]) == value
        assert float(row["p"]) <= float(row["p Holm"]) <= 1
        clear = float(row["p Holm"]) < 0.05
        assert (row["direction"] in ("better", "worse")) is clear
    # The loss is better where it is lower.
    for row in told:
        if row["direction"] in ("better", "worse") and "loss" in row["metric"]:
            assert (row["direction"] == "better") is (float(row["difference"]) < 0)


def test_the_baseline_is_fedavg_unless_named(place: Path) -> None:
    fine("report", place / "alone.toml", place / "two_b.toml")
    assert {row["baseline"] for row in rows(out(place) / "comparison.csv")} == {"two_b"}
    assert "no evaluated run is called so; did you mean 'one'" in refused(
        "report", *configs(place), "--baseline", "ona"
    )
    fine("report", place / "alone.toml")
    assert rows(out(place) / "comparison.csv") == []
    assert 'id="comparison"' not in (out(place) / "report.html").read_text()


def test_a_silos_images_score_as_in_a_benchmark_of_their_own(place: Path) -> None:
    fine("report", *configs(place))
    groups = [row for row in rows(out(place) / "scores.csv") if row["grouped by"] == "folder of the images"]
    assert {row["group"] for row in groups} == {"north", "south"}
    for run in RUNS:
        (row,) = [
            row for row in groups if (row["run"], row["group"], row["metric"]) == (run, "north", "loss")
        ]
        whole = scores(place, run, "north")["loss"]
        assert float(row["value"]) == pytest.approx(whole["value"])
        assert int(row["n"]) == whole["n"]
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    by_silo = [row for row in rows(out(place) / "scores.csv") if row["grouped by"] == "silo of the images"]
    for row in by_silo:
        assert float(row["value"]) == scores(place, row["run"], row["group"])[row["metric"]]["value"]
    assert {(row["run"], row["group"]) for row in by_silo} == {
        (run, silo) for run in RUNS for silo in ("north", "both")
    }


def test_local_only_is_shown_by_silo(place: Path) -> None:
    fine("report", *configs(place))
    own = [
        row
        for row in rows(out(place) / "scores.csv")
        if (row["grouped by"], row["benchmark"]) == ("own projector", "loss")
    ]
    assert {(row["run"], row["group"]) for row in own} == {("alone", "clinic"), ("alone", "lab")}
    for row in own:
        (path,) = (place / "build/scores/study/alone/answers").glob(f"silos-{row['group']}.*.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        answers = [line["answer"] for line in lines if line["benchmark"] == "loss"]
        total, tokens = (sum(each) for each in zip(*answers, strict=True))
        assert float(row["value"]) == pytest.approx(total / tokens)


def test_errors_are_each_runs_own_and_counted(place: Path) -> None:
    fine("report", *configs(place))
    page = (out(place) / "report.html").read_text()
    totals = json.loads(re.search(r'id="totals">(.*?)</script>', page)[1])  # type: ignore[index]
    for run in ("one", "two_b"):
        accuracy = scores(place, run, "pope")["accuracy"]
        wrong = round((1 - accuracy["value"]) * accuracy["n"])
        told = totals["pope"][run]
        assert (told["wrong"], told["right"], told[""]) == (wrong, accuracy["n"] - wrong, accuracy["n"])
        shown = page.count(f'data-run="{run}" data-verdict="wrong"')
        assert min(wrong, 24) <= shown <= wrong
    assert totals["pope"][""]["disagree"] == totals["pope"]["one"]["disagree"]


def test_provenance_is_that_of_the_manifests(place: Path) -> None:
    fine("report", *configs(place))
    content = json.loads((out(place) / "report.json").read_text())
    for run, seed in (("one", "1"), ("two_b", "2")):
        facts = content["runs"][run]["provenance"]
        manifest = json.loads((place / f"build/runs/study/{run}/manifest.json").read_text())
        assert facts["seed"] == seed
        assert facts["rounds"] == "3"
        assert facts["silos"] == f"2 with {sum(t['samples'] for t in manifest['texts'].values())} texts"
        assert facts["LLM's content"] == fingerprint(manifest["identity"]["language"]["files"])[:12]
        assert facts["run"] == manifest["fingerprint"][:12]
        assert f"torch {manifest['made_by']['packages']['torch']}" in facts["software"]
        assert facts["privacy"] == "none"


def test_a_missing_benchmark_or_run_is_a_gap_with_a_name(place: Path) -> None:
    (place / "build/scores/study/two_b/loss.json").unlink()
    shutil.rmtree(place / "build/runs/study/alone")
    said = fine("report", *configs(place))
    assert "two_b, loss: no scores; run 'fedcmp evaluate'" in " ".join(said.split())
    assert "left out: " in said
    page = (out(place) / "report.html").read_text()
    assert "<b>two_b</b> has no score of loss" in page
    assert "<b>alone</b> is not in this report: " in page
    assert "two_b, loss: no answers of two_b" in page
    content = json.loads((out(place) / "report.json").read_text())
    assert set(content["runs"]) == {"one", "two_b"}
    assert "no finished run here" in content["absent"]["alone"]
    assert "no finished run here" in refused("report", place / "alone.toml")
    for path in (place / "build/scores/study/two_b").glob("*.json"):
        path.unlink()
    assert "run 'two_b' has no scores; run 'fedcmp evaluate' first" in refused("report", place / "two_b.toml")


def test_files_beside_the_page_are_whole_and_none_is_left_over(place: Path) -> None:
    fine("report", *configs(place))
    folder = out(place)
    linked = set(re.findall(r'<a href="([^"#]+)" download', (folder / "report.html").read_text()))
    assert linked | {"report.html"} == {path.name for path in folder.iterdir()}
    for path in folder.glob("*.svg"):
        ElementTree.parse(path)
    told = [row for row in rows(folder / "scores.csv") if not row["group"]]
    assert len(told) == sum(len(scores(place, run, name)) for run in RUNS for name in BENCHMARKS)
    tex = (folder / "scores.tex").read_text()
    assert r"two\_b & " in tex
    head = next(line for line in tex.splitlines() if line.startswith("run &"))
    for line in tex.splitlines():
        if line.endswith(r"\\"):
            assert line.count(" & ") == head.count(" & ")
    history = rows(folder / "history.csv")
    assert {row["run"] for row in history} == {*RUNS}
    (folder / "loss-gone.svg").write_text("<svg/>")
    fine("report", place / "one.toml")
    assert {path.name for path in folder.glob("loss*.svg")} == {"loss.svg", "loss-one.svg"}


BENCHMARKS = ("both", "north", "loss", "captions", "pope")


def test_the_same_runs_give_the_same_bytes(place: Path) -> None:
    fine("report", *configs(place))
    before = {path.name: path.read_bytes() for path in out(place).iterdir()}
    fine("report", *configs(place))
    assert {path.name: path.read_bytes() for path in out(place).iterdir()} == before
