from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from evaluate.answers import open_answers
from pipeline.cli import main


def call(command: str, config: Path, *overrides: str, more: tuple[str, ...] = ()) -> Result:
    words = [word for override in overrides for word in ("--set", override)]
    return CliRunner().invoke(main, [command, str(config), *words, *more])


def scores(config: Path, run: str, benchmark: str) -> dict:
    return json.loads((config.parent / "build/scores/study" / run / f"{benchmark}.json").read_text())


def answers_file(config: Path, run: str, benchmark: str) -> Path:
    return config.parent / "build/scores/study" / run / "answers" / f"{benchmark}.projector.jsonl"


@pytest.fixture(scope="module")
def evaluated(extracted: Path) -> Path:
    for name in ("judged", "other"):
        assert call("federate", extracted, f"run={name}", f"seed={len(name)}").exit_code == 0
    result = call("evaluate", extracted, "run=judged", "seed=6")
    assert result.exit_code == 0, result.output
    return extracted


def test_scores_carry_intervals_and_counts(evaluated: Path) -> None:
    for benchmark, metrics, number in (
        ("loss", {"loss"}, 12),
        ("captions", {"CIDEr-D", "exact match"}, 12),
        ("pope", {"accuracy", "f1", "accuracy random", "yes ratio"}, 24),
    ):
        content = scores(evaluated, "judged", benchmark)
        assert set(content["metrics"]) == metrics
        assert content["counts"]["items"] == number
        for score in content["metrics"].values():
            assert score["low"] <= score["value"] <= score["high"]
            assert score["n"] == number


def test_the_loss_is_that_of_the_llm(evaluated: Path, llama_dir: Path) -> None:
    import torch

    from pipeline.cache import FeatureCache
    from pipeline.language import FrozenLanguageModel
    from pipeline.projector import load_projector
    from pipeline.prompts import tokenise

    language = FrozenLanguageModel(llama_dir, dtype="float32", device=torch.device("cpu"))
    projector, _ = load_projector(evaluated.parent / "build/runs/study/judged/projector.safetensors")
    cache = FeatureCache(evaluated.parent / "features/heldout.zarr")
    total, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(cache.texts):
            sample = tokenise(cache.text(index), "plain", language.tokenizer, patches=4, max_length=999)
            features = cache.tensor([cache.text_image[index]]).float()
            losses, _ = language.token_losses(*language.collate([sample]), projector(features))
            total, tokens = total + float(losses.sum()), tokens + len(losses)
    assert scores(evaluated, "judged", "loss")["metrics"]["loss"]["value"] == pytest.approx(
        total / tokens, abs=1e-5
    )


def test_answers_are_kept_and_resumed_in_the_middle(evaluated: Path) -> None:
    path = answers_file(evaluated, "judged", "pope")
    whole = path.read_bytes()
    result = call("evaluate", evaluated, "run=judged", "seed=6")
    assert "nothing to answer" in result.output
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:11]) + lines[11][:9])
    before = scores(evaluated, "judged", "pope")
    assert call("evaluate", evaluated, "run=judged", "seed=6").exit_code == 0
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert scores(evaluated, "judged", "pope") == before


def test_answers_of_an_older_projector_are_not_taken(evaluated: Path) -> None:
    """Retraining at the same path changes the key, so nothing stale is scored."""
    path = answers_file(evaluated, "judged", "captions")
    old = path.read_bytes()
    run = evaluated.parent / "build/runs/study"
    shutil.copytree(run / "judged", run / "kept")
    shutil.rmtree(run / "judged")
    shutil.copytree(run / "other", run / "judged")
    refused = call("score", evaluated, "run=judged")
    assert refused.exit_code == 2
    assert "answers are missing" in refused.output
    assert call("evaluate", evaluated, "run=judged").exit_code == 0
    assert path.read_bytes().splitlines()[0] != old.splitlines()[0]
    shutil.rmtree(run / "judged")
    shutil.move(run / "kept", run / "judged")
    assert call("evaluate", evaluated, "run=judged", "seed=6").exit_code == 0


def test_score_needs_no_model(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.language.FrozenLanguageModel.__init__", None)
    path = evaluated.parent / "build/scores/study/judged/pope.json"
    before = path.read_bytes()
    path.unlink()
    assert call("score", evaluated, "run=judged", "seed=6").exit_code == 0
    assert path.read_bytes() == before


def test_missing_images_and_duplicate_ids_are_counted(evaluated: Path, tmp_path: Path) -> None:
    line = {"question_id": 1, "image": "scans/500.png", "text": "Is there a dog?", "label": "no"}
    lines = [line, line | {"question_id": 2, "image": "gone.png"}, line]
    (tmp_path / "pope.json").write_text("".join(json.dumps(each) + "\n" for each in lines))
    result = call(
        "evaluate",
        evaluated,
        "run=judged",
        "seed=6",
        f"evaluate.benchmarks.few.questions={{ random = '{tmp_path}/pope.json' }}",
        "evaluate.benchmarks.few.name=pope",
        more=("--benchmark", "few"),
    )
    assert result.exit_code == 0, result.output
    assert "few: 1 missing images not scored" in result.output
    assert "few: 1 duplicate ids not scored" in result.output
    assert scores(evaluated, "judged", "few")["counts"] == {
        "items": 1,
        "missing images": 1,
        "duplicate ids": 1,
        "projectors": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "pope.json:1: not valid JSON"),
        ('{"image": "a"}', "pope.json:1: no field 'question_id'"),
        (
            '{"question_id": 1, "image": "a.png", "text": "?", "label": "no"}',
            "none of its images (first: 'a.png')",
        ),
    ],
)
def test_unfit_files_are_named(evaluated: Path, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "pope.json").write_text(content)
    questions = f"evaluate.benchmarks.pope.questions={{ random = '{tmp_path}/pope.json' }}"
    result = call("evaluate", evaluated, "run=judged", "seed=6", questions)
    assert result.exit_code == 2
    assert message in result.output


def test_local_only_is_judged_by_its_silos_projectors(evaluated: Path) -> None:
    options = ("run=alone", "federate.strategy.name=local_only")
    assert call("federate", evaluated, *options).exit_code == 0
    assert call("evaluate", evaluated, *options).exit_code == 0
    assert scores(evaluated, "alone", "loss")["counts"]["projectors"] == 2
    names = sorted(
        path.name for path in (evaluated.parent / "build/scores/study/alone/answers").glob("loss.*")
    )
    assert names == ["loss.silos-clinic.jsonl", "loss.silos-lab.jsonl"]
    values = []
    for name in names:
        lines = (evaluated.parent / "build/scores/study/alone/answers" / name).read_text().splitlines()[1:]
        values.append([json.loads(line)["answer"] for line in lines])
    total = sum(loss for each in values for loss, _ in each)
    tokens = sum(count for each in values for _, count in each)
    assert scores(evaluated, "alone", "loss")["metrics"]["loss"]["value"] == pytest.approx(total / tokens)


def test_open_answers_begins_anew_for_another_key(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    assert open_answers(path, {"projector": "a"}) == {}
    with path.open("a") as file:
        file.write('{"answer":"yes","id":"1","image":"x"}\n{"answer":"n')
    assert open_answers(path, {"projector": "a"}) == {"1": "yes"}
    assert path.read_text().endswith('"image":"x"}\n')
    assert open_answers(path, {"projector": "b"}) == {}
    assert len(path.read_text().splitlines()) == 1


def test_the_report_is_whole_and_self_contained(evaluated: Path, tmp_path: Path) -> None:
    configs = []
    for name in ("judged", "alone"):
        config = tmp_path / f"{name}.toml"
        strategy = "local_only" if name == "alone" else "fedavg"
        seed = 6 if name == "judged" else 0
        config.write_text(
            f'extends = "{evaluated}"\nseed = {seed}\n[federate.strategy]\nname = "{strategy}"\n'
        )
        configs.append(str(config))
        for command in ("federate", "evaluate"):
            assert call(command, config).exit_code == 0
    result = CliRunner().invoke(main, ["report", *configs])
    assert result.exit_code == 0, result.output
    folder = evaluated.parent / "build/report/study"
    content = json.loads((folder / "report.json").read_text())
    assert content["experiment"] == "study"
    assert set(content["runs"]) == {"judged", "alone"}
    assert content["runs"]["alone"]["strategy"] == "local_only"
    score = content["runs"]["judged"]["benchmarks"]["pope"]["accuracy"]
    assert set(score) == {"value", "low", "high", "n"}
    assert score == scores(evaluated, "judged", "pope")["metrics"]["accuracy"]
    page = (folder / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "<script" not in page
    assert page.count("<img") == page.count("data:image") == 12
    assert page.count("<polyline") == 4
    assert f"{score['value']:.3f}" in page
    assert (
        f"{score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})" in (folder / "report.md").read_text()
    )


def test_a_report_is_about_one_experiment(evaluated: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(f'extends = "{evaluated}"\nexperiment = "another"\n')
    result = CliRunner().invoke(main, ["report", str(evaluated), str(other)])
    assert result.exit_code == 2
    assert "another, study" in result.output
