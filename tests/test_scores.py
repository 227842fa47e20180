"""Answers and scores cannot mix: what differs is asked again, refused or shown, and nothing else is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, picture

from fedcmp.cli import main
from fedcmp.evaluate import benchmarks
from fedcmp.evaluate.benchmarks.base import BENCHMARKS
from fedcmp.evaluate.benchmarks.captions import Captions
from fedcmp.evaluate.benchmarks.pope import Pope

BASE = """
extends = "{extracted}"
build = "{root}/build"
features = "{root}/features"

[language]
path = "{root}/llm"

[evaluate.benchmarks.pope]
questions = {{ random = "{root}/pope.json", popular = "{root}/pope.json" }}

[evaluate.benchmarks.captions]
annotations = "{root}/captions.json"

[evaluate.benchmarks.loss]
shuffled = true
"""
QUESTIONS = 24


def run(command: str, *words: object) -> Result:
    return CliRunner().invoke(main, [command, *map(str, words)])


def fine(command: str, *words: object) -> str:
    result = run(command, *words)
    assert result.exit_code == 0, result.output
    return result.output


def refused(command: str, *words: object) -> str:
    result = run(command, *words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def made(extracted: Path, llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that have answered everything."""
    root = tmp_path_factory.mktemp("scores")
    shutil.copytree(extracted.parent / "features", root / "features")
    shutil.copytree(llama_dir, root / "llm")
    for name in ("pope.json", "captions.json"):
        shutil.copy(extracted.parent / name, root / name)
    (root / "base.toml").write_text(BASE.format(extracted=extracted, root=root))
    for name, text in (
        ("one", "seed = 1"),
        ("two", "seed = 2"),
        ("alone", '[federate.strategy]\nname = "local_only"'),
    ):
        (root / f"{name}.toml").write_text(f'extends = "base.toml"\n{text}\n')
        fine("federate", root / f"{name}.toml")
        fine("evaluate", root / f"{name}.toml")
    return root


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of its own; files of runs and scores name no folder."""
    shutil.copytree(made, tmp_path / "work")
    for path in (tmp_path / "work").glob("*.toml"):
        path.write_text(path.read_text().replace(str(made), str(tmp_path / "work")))
    return tmp_path / "work"


def answers(place: Path, name: str = "one") -> list[dict[str, Any]]:
    (path,) = (place / f"build/scores/study/{name}/answers").glob("projector.*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def scores(place: Path, benchmark: str, name: str = "one") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place / f"build/scores/study/{name}/{benchmark}.json").read_text())
    return content


def edit(path: Path, change: Any) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_one_changed_question_asks_that_one_alone(place: Path) -> None:
    before = answers(place)
    edit(place / "pope.json", lambda rows: rows[3].update(text="Is there a cat in the image?"))
    assert "answers are missing" in refused("score", place / "one.toml", "--benchmark", "pope")
    fine("evaluate", place / "one.toml")
    after = answers(place)
    assert after[: len(before)] == before
    assert [row["image"] for row in after[len(before) :]] == ["scans/501.png"]


def test_a_question_in_two_splits_is_asked_once(place: Path) -> None:
    # Two questions about a picture read the same.
    assert len([row for row in answers(place) if row["benchmark"] == "pope"]) == QUESTIONS // 2
    assert scores(place, "pope")["counts"]["items"] == 2 * QUESTIONS


def test_changed_labels_ask_nothing_and_change_scores(place: Path) -> None:
    before, old = answers(place), scores(place, "pope")
    edit(place / "pope.json", lambda rows: [row.update(label="yes") for row in rows])
    assert "nothing to answer" in fine("evaluate", place / "one.toml")
    assert answers(place) == before
    assert scores(place, "pope")["metrics"] != old["metrics"]
    assert scores(place, "pope")["made_of"]["labels"] != old["made_of"]["labels"]


def test_another_picture_under_the_name_is_asked_about_again(place: Path) -> None:
    before = answers(place)
    images = place / "pictures"
    shutil.copytree(next(place.parent.parent.rglob("experiment*/heldout")), images)
    (images / "scans/511.png").write_bytes(picture(9999))
    more = [f"extract.silos.heldout.path={images}/pairs.json", f"extract.silos.heldout.images={images}"]
    words = [word for each in more for word in ("--set", each)]
    fine("extract", place / "one.toml", "--silo", "heldout", *words)
    assert "have other features in" in refused("score", place / "one.toml", "--benchmark", "pope")
    fine("evaluate", place / "one.toml", "--benchmark", "pope")
    fresh = {row["image"] for row in answers(place)[len(before) :]}
    assert "scans/511.png" in fresh
    assert len(fresh) < 12  # only those of its shard


@pytest.mark.parametrize("answer", [["0", "1"], {"a": 1}, None, 3, [1.0, 2.0]])
def test_answers_of_the_wrong_form_are_asked_again(place: Path, answer: Any) -> None:
    (path,) = (place / "build/scores/study/one/answers").glob("projector.*.jsonl")
    lines, old = path.read_text().splitlines(), scores(place, "pope")
    number = next(n for n, line in enumerate(lines) if '"benchmark":"pope"' in line)
    lines[number] = json.dumps(json.loads(lines[number]) | {"answer": answer})
    path.write_text("\n".join(lines) + "\n")
    assert "answers are missing" in refused("score", place / "one.toml", "--benchmark", "pope")
    fine("evaluate", place / "one.toml", "--benchmark", "pope")
    assert scores(place, "pope") == old


def test_a_swapped_projector_is_refused_and_leaves_nothing_behind(place: Path) -> None:
    runs = place / "build/runs/study"
    own, old, before = runs / "one/projector.safetensors", scores(place, "pope"), answers(place)
    kept = own.read_bytes()
    shutil.copy(runs / "two/projector.safetensors", own)
    (place / "build/scores/study/one/pope.json").unlink()
    edit(place / "pope.json", lambda rows: rows[0].update(text="Is there a bird?"))
    message = refused("evaluate", place / "one.toml")
    assert "one/projector.safetensors: holds" in message
    assert "another file was put in its place" in message
    assert answers(place) == before
    own.write_bytes(kept)
    edit(place / "pope.json", lambda rows: rows[0].update(text="Is there a dog in the image?"))
    fine("evaluate", place / "one.toml")
    assert (scores(place, "pope"), answers(place)) == (old, before)


def test_a_file_of_answers_under_another_name_is_refused(place: Path) -> None:
    ours, theirs = (
        next((place / f"build/scores/study/{name}/answers").glob("projector.*")) for name in ("one", "two")
    )
    shutil.copy(theirs, ours)
    assert "answers of another projector or LLM" in refused(
        "score", place / "one.toml", "--benchmark", "pope"
    )


STALE = {
    "labels": ("other labels)", lambda p, m: edit(p / "pope.json", lambda rows: rows[0].update(label="no"))),
    "rules": ('rules: "Pope 2" here, "Pope 1" there', lambda p, m: m.setattr(Pope, "version", 2)),
    "bootstrap": ("bootstrap: 300 here, 200 there", lambda p, m: ["--set", "evaluate.bootstrap=300"]),
    "options": (
        'options.object_pattern: "dog" here, null there',
        lambda p, m: ["--set", "evaluate.benchmarks.captions.object_pattern=dog"],
    ),
    "questions": ("other questions)", lambda p, m: edit(p / "pope.json", lambda rows: rows.pop())),
    "answers": ("other answers)", lambda p, m: say_otherwise(p)),
}


def say_otherwise(place: Path) -> None:
    (path,) = (place / "build/scores/study/one/answers").glob("projector.*.jsonl")
    row = next(row for row in answers(place) if row["benchmark"] == "pope")
    with path.open("a") as file:
        file.write(json.dumps(row | {"answer": "something else"}) + "\n")


@pytest.mark.parametrize("what", STALE)
def test_scores_that_no_longer_fit_are_not_reported(
    what: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, change = STALE[what]
    fine("report", place / "one.toml")
    words = change(place, monkeypatch) or []
    message = refused("report", place / "one.toml", *words)
    benchmark = "captions" if what == "options" else "pope" if what != "bootstrap" else "loss"
    assert f"run 'one': its scores of '{benchmark}' are stale ({told}" in message
    assert "run 'fedcmp score' again" in message
    fine("score", place / "one.toml", *words)
    fine("report", place / "one.toml", *words)


def test_nothing_but_answering_needs_caches_or_models(place: Path) -> None:
    configs = [place / f"{name}.toml" for name in ("one", "two")]
    fine("score", *configs)
    fine("report", *configs)
    printed = fine("compare", *configs)
    files = [*place.glob("build/scores/study/*o*/*.json"), *place.glob("build/report/study/*")]
    files = [path for path in files if "alone" not in path.parts]
    before = {path: path.read_bytes() for path in files}
    for name in ("features", "llm"):
        shutil.rmtree(place / name)
    for path in before:
        if "report" in path.parts or path.name == "pope.json":
            path.unlink()
    fine("score", *configs)
    fine("report", *configs)
    assert {path: path.read_bytes() for path in files} == before
    assert fine("compare", *configs) == printed
    assert "no config.json" in refused("evaluate", configs[0])


def test_scoring_and_comparing_load_no_torch() -> None:
    modules = "fedcmp.evaluate.run, fedcmp.evaluate.report.collect, fedcmp.evaluate.compare"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_benchmark_that_cannot_be_asked_stops_no_other(place: Path) -> None:
    for name in ("pope", "captions", "loss"):
        (place / f"build/scores/study/one/{name}.json").unlink()
    (place / "captions.json").unlink()
    for command in ("evaluate", "score"):
        output = refused(command, place / "one.toml")
        assert "captions.json: captions cannot be read" in output
        assert "1 of 3 benchmarks failed, as said above: captions" in output
        assert "pope: accuracy" in output
    assert scores(place, "pope")["counts"]["items"] == 2 * QUESTIONS


def test_a_run_that_cannot_be_judged_stops_no_other(place: Path) -> None:
    shutil.rmtree(place / "build/runs/study/one")
    output = refused("evaluate", place / "one.toml", place / "two.toml")
    assert "no finished run here" in output
    assert "Scores of two" in output
    assert "1 of 2 runs failed, as said above: one" in output


def test_runs_of_one_name_are_all_evaluated(place: Path) -> None:
    (place / "twin").mkdir()
    text = 'extends = "../base.toml"\nseed = 1\nexperiment = "twin"\n'
    (place / "twin/one.toml").write_text(text)
    fine("federate", place / "twin/one.toml")
    output = fine("evaluate", place / "twin/one.toml", place / "one.toml", "--benchmark", "pope")
    assert output.count("Scores of one") == 2


def test_the_report_shows_counts_of_every_run_and_gaps(place: Path) -> None:
    (place / "few.json").write_text((place / "pope.json").read_text().replace("scans/50", "scans/99", 4))
    words = ["--set", f"evaluate.benchmarks.pope.questions={{ random = '{place}/few.json' }}"]
    fine("evaluate", place / "two.toml", "--benchmark", "pope", *words)
    config = place / "two.toml"
    config.write_text(
        config.read_text() + f"[evaluate.benchmarks.pope]\nquestions = {{ random = '{place}/few.json' }}\n"
    )
    (place / "build/scores/study/two/captions.json").unlink()
    output = fine("report", place / "one.toml", config, place / "alone.toml")
    assert "two, captions: no scores; run 'fedcmp evaluate'" in output
    assert "two, pope: not comparable with 'one': other questions, labels" in output
    folder = place / "build/report/study"
    content = json.loads((folder / "report.json").read_text())["runs"]
    assert content["two"]["details"]["pope"]["counts"]["missing images"] == 4
    assert content["two"]["notes"]["captions"] == "no scores; run 'fedcmp evaluate'"
    assert content["one"]["details"]["pope"]["made_of"]["bootstrap"] == 200
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for shown in (text, page):
        assert "4 missing images" in shown
        assert "mean over 2 projectors" in shown
        assert (
            "no scores; run &#x27;fedcmp evaluate&#x27;".replace("&#x27;", "'" if shown is text else "&#x27;")
            in shown
        )
    assert f"| one | pope | {2 * QUESTIONS} |" in text
    assert f"| two | pope | {2 * QUESTIONS - 4} |" in text
    assert f"n = {2 * QUESTIONS - 4}" in page
    assert f"n = {2 * QUESTIONS}" in page
    assert "<dt>alone (silo clinic, first of 2)</dt>" in page


def test_seeds_of_a_comparison_are_of_one_method(place: Path) -> None:
    for name, text in (
        ("other", 'seed = 1\n[federate.strategy]\nname = "fedavgm"'),
        ("other2", 'seed = 2\n[federate.strategy]\nname = "fedavgm"'),
        ("longer", 'seed = 2\n[federate]\nrounds = 2\n[federate.strategy]\nname = "fedavgm"'),
    ):
        (place / f"{name}.toml").write_text(f'extends = "base.toml"\n{text}\n')
        fine("federate", place / f"{name}.toml")
        fine("evaluate", place / f"{name}.toml", "--benchmark", "pope")
    only = ("--benchmark", "pope")

    def paths(*names: str) -> list[Path]:
        return [place / f"{name}.toml" for name in names]

    output = fine("compare", *paths("one", "other", "two", "other2"), *only)
    assert "20,000 draws" in output
    for names, told in (
        (("one", "other", "two", "longer"), "federate.rounds: 3 here, 2 there"),
        (("one", "other", "other2", "two"), "'one' and 'other2' are not seeds of one method"),
        (("one", "other", "one", "other"), "seeds 1, 1 of 'one': each may come once"),
        (("one", "other2", "two", "other"), "'one' has seed 1 and 'other2' seed 2"),
    ):
        assert told in refused("compare", *paths(*names), *only)
    config = place / "other.toml"
    config.write_text(config.read_text() + "[evaluate.benchmarks.pope]\nrank = true\n")
    fine("evaluate", config, *only)
    assert "rank: false here, true there" in refused("compare", *paths("one", "other"), *only)
    config.write_text(config.read_text().replace("rank = true", f"questions = {{random = '{place}/l.json'}}"))
    (place / "l.json").write_text((place / "pope.json").read_text().replace('"yes"', '"no"', 1))
    edit(place / "l.json", lambda rows: None)
    fine("evaluate", config, *only)
    assert "questions or labels of 'one' and 'other' differ under one id" in refused(
        "compare", *paths("one", "other"), *only
    )


def test_a_module_that_cannot_be_imported_breaks_no_other(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    (tmp_path / "odd.py").write_text("import nothing_of_this_name\n")
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    monkeypatch.setattr(BENCHMARKS, "_broken", {})
    fine("score", place / "one.toml")
    message = refused("score", place / "one.toml", "--set", "evaluate.benchmarks.pope.name=odd")
    assert "evaluate/benchmarks/odd.py cannot be imported: ModuleNotFoundError" in message


def test_what_scores_hide_is_said(place: Path) -> None:
    pope = Pope(questions={"random": place})
    assert pope.remarks(["yes", "No.", "there isn't", "Yes!"]) == ({}, None)
    counts, warning = pope.remarks(["a dog", "", "yes"])
    assert counts == {"undecided answers": 2}
    assert warning is not None
    assert "rank = true" in warning
    assert pope.model_copy(update={"rank": True}).remarks(["a dog"]) == ({}, None)
    captions = Captions(annotations=place)
    assert captions.remarks(["a dog", "a cat"] * 15)[1] is not None
    assert captions.remarks([f"a dog {n}" for n in range(30)]) == ({"distinct answers": 30}, None)
    content = scores(place, "pope")
    said = {row["answer"] for row in answers(place) if row["benchmark"] == "pope"}
    assert said
    assert content["remarks"].get("undecided answers", 0) <= 2 * QUESTIONS
    assert "distinct answers" in scores(place, "captions")["remarks"]


def test_the_loss_before_other_pictures_is_a_metric_of_its_own(place: Path) -> None:
    content = scores(place, "loss")
    assert content["headlines"] == ["loss", "loss, pictures shuffled"]
    own, other = (content["metrics"][name] for name in content["headlines"])
    assert (own["n"], other["n"]) == (12, 12)
    assert own["value"] != other["value"]
    fine(
        "evaluate",
        place / "two.toml",
        "--benchmark",
        "loss",
        "--set",
        "evaluate.benchmarks.loss.shuffled=false",
    )
    plain = scores(place, "loss", "two")["metrics"]
    assert plain.keys() == {"loss"}
    fine("evaluate", place / "two.toml", "--benchmark", "loss")
    assert scores(place, "loss", "two")["metrics"]["loss"]["value"] == plain["loss"]["value"]


def test_pictures_that_were_trained_on_are_counted(place: Path) -> None:
    assert scores(place, "pope")["counts"]["images trained on"] == 0
    edit_pope = [
        {"question_id": n, "image": f"scans/{n:03d}.png", "text": "Is there a dog?", "label": "yes"}
        for n in range(5)
    ]
    (place / "seen.json").write_text("".join(json.dumps(row) + "\n" for row in edit_pope))
    config = place / "one.toml"
    config.write_text(
        config.read_text()
        + f"""
[evaluate.benchmarks.seen]
name = "pope"
silo = "clinic"
questions = {{ random = "{place}/seen.json" }}
"""
    )
    output = fine("evaluate", config, "--benchmark", "seen")
    assert "seen: 5 of its images were trained on too, byte for byte" in output
    assert scores(place, "seen")["counts"]["images trained on"] == 5
    shutil.rmtree(place / "features")
    assert "5 of its images were trained on" in fine("score", config, "--benchmark", "seen")
