from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.evaluate.answers import begin_answers, read_answers
from fedcmp.pipeline.errors import UserError


def call(command: str, config: Path, *overrides: str, more: tuple[str, ...] = ()) -> Result:
    words = [word for override in overrides for word in ("--set", override)]
    return CliRunner().invoke(main, [command, str(config), *words, *more])


def scores(config: Path, run: str, benchmark: str) -> dict:
    return json.loads((config.parent / "build/scores/study" / run / f"{benchmark}.json").read_text())


def answers_file(config: Path, run: str) -> Path:
    """The file with all answers of a run's one projector."""
    folder = config.parent / "build/scores/study" / run / "answers"
    (path,) = folder.glob("projector.*.jsonl")
    return path


def lines_of(path: Path, benchmark: str) -> list[dict]:
    """What a benchmark had answered in a file of answers."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [row for row in rows if row["benchmark"] == benchmark]


FIGURES = ("accuracy", "precision", "recall", "f1", "yes ratio")


@pytest.fixture(scope="module")
def evaluated(extracted: Path) -> Path:
    for name in ("judged", "other"):
        trained = call("federate", extracted, f"run={name}", f"seed={len(name)}")
        assert trained.exit_code == 0, trained.output
    result = call("evaluate", extracted, "run=judged", "seed=6")
    assert result.exit_code == 0, result.output
    return extracted


def test_scores_carry_intervals_and_counts(evaluated: Path) -> None:
    for benchmark, metrics, number in (
        ("loss", {"loss"}, 12),
        ("captions", {"CIDEr-D", "exact match", "ROUGE-L", *(f"BLEU-{n}" for n in range(1, 5))}, 12),
        ("pope", {"accuracy", "f1", *(f"{n} random" for n in FIGURES)}, 24),
    ):
        content = scores(evaluated, "judged", benchmark)
        assert set(content["metrics"]) == metrics
        assert content["counts"]["items"] == number
        for score in content["metrics"].values():
            assert score["low"] <= score["value"] <= score["high"]
            assert score["n"] == number


def test_the_loss_is_that_of_the_llm(evaluated: Path, llama_dir: Path) -> None:
    import torch

    from fedcmp.pipeline.cache import FeatureCache
    from fedcmp.pipeline.models.language import FrozenLanguageModel
    from fedcmp.pipeline.models.projector import load_projector
    from fedcmp.pipeline.models.prompts import tokenise

    language = FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")
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
    path = answers_file(evaluated, "judged")
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


def test_another_llm_or_configuration_than_the_runs_is_refused(evaluated: Path, tmp_path: Path) -> None:
    for override, message in (
        ("federate.rounds=9", "federate.rounds: 9 here, 3 there"),
        ("federate.strategy.name=fedcmp", 'federate.strategy.name: "fedcmp" here, "fedavg" there'),
    ):
        for command in ("evaluate", "score"):
            result = call(command, evaluated, "run=judged", "seed=6", override)
            assert result.exit_code == 2
            assert message in result.output
    source = evaluated.parent
    llm = load(evaluated).language.path
    shutil.copytree(llm, tmp_path / "llm")
    tokenizer = tmp_path / "llm/tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    result = call("evaluate", evaluated, "run=judged", "seed=6", f"language.path={tmp_path}/llm")
    assert result.exit_code == 2
    assert "language.files.tokenizer_config.json" in result.output
    assert (source / "build/scores/study/judged/pope.json").is_file()


def test_answers_of_another_projector_or_length_are_not_scored(evaluated: Path) -> None:
    """Retraining at the same path changes the key: nothing stale is scored, nothing is lost."""
    path = answers_file(evaluated, "judged")
    old = path.read_bytes()
    run = evaluated.parent / "build/runs/study"
    manifest = run / "judged/manifest.json"
    whole = manifest.read_text()
    content = json.loads(whole)
    other = json.loads((run / "other/manifest.json").read_text())
    content["projectors"] = other["projectors"]
    manifest.write_text(json.dumps(content))
    refused = call("score", evaluated, "run=judged", "seed=6")
    assert refused.exit_code == 2
    assert "answers are missing" in refused.output
    manifest.write_text(whole)
    shorter = "evaluate.benchmarks.captions.max_new_tokens=2"
    assert call("score", evaluated, "run=judged", "seed=6", shorter).exit_code == 2
    assert call("score", evaluated, "run=judged", "seed=6").exit_code == 0
    assert path.read_bytes() == old


def test_score_needs_no_model(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedcmp.pipeline.models.language.FrozenLanguageModel.__init__", None)
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
        "bad entries": 0,
        "failed items": 0,
        "images trained on": 0,
        "empty answers": 0,
        "projectors": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{broken", "pope.json:1: not valid JSON"),
        ("", "benchmark 'pope': its files hold no question"),
        (
            '{"question_id": 1, "image": "a.png", "text": "?", "label": "maybe"}',
            "pope.json:1: label 'maybe' is neither yes nor no",
        ),
        ('{"image": "a"}', "pope.json:1: no field 'label'"),
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


def test_labels_of_another_case_are_the_same_labels(evaluated: Path, tmp_path: Path) -> None:
    text = (evaluated.parent / "pope.json").read_text()
    (tmp_path / "pope.json").write_text(text.replace('"yes"', '"Yes "').replace('"no"', '"NO"'))
    questions = f"evaluate.benchmarks.pope.questions={{ random = '{tmp_path}/pope.json' }}"
    before = scores(evaluated, "judged", "pope")["metrics"]
    assert call("score", evaluated, "run=judged", "seed=6", questions).exit_code == 0
    assert scores(evaluated, "judged", "pope")["metrics"] == before


def test_local_only_is_judged_by_its_silos_projectors(evaluated: Path) -> None:
    options = ("run=alone", "federate.strategy.name=local_only")
    assert call("federate", evaluated, *options).exit_code == 0
    assert call("evaluate", evaluated, *options).exit_code == 0
    assert scores(evaluated, "alone", "loss")["counts"]["projectors"] == 2
    paths = sorted((evaluated.parent / "build/scores/study/alone/answers").iterdir())
    assert [path.name.split(".")[0] for path in paths] == ["silos-clinic", "silos-lab"]
    values = [[row["answer"] for row in lines_of(path, "loss")] for path in paths]
    total = sum(loss for each in values for loss, _ in each)
    tokens = sum(count for each in values for _, count in each)
    assert scores(evaluated, "alone", "loss")["metrics"]["loss"]["value"] == pytest.approx(total / tokens)


def test_what_has_no_finite_likelihood_stops_nothing(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fedcmp.evaluate.answering._likelihoods",
        lambda language, tokens, projected: [[1.0 if n else float("nan"), 2.0] for n in range(len(tokens))],
    )
    result = call("evaluate", evaluated, "run=other", "seed=5", more=("--benchmark", "loss"))
    assert result.exit_code == 0, result.output
    content = scores(evaluated, "other", "loss")
    assert (content["counts"]["items"], content["counts"]["failed items"]) == (9, 3)
    assert content["metrics"]["loss"]["value"] == 0.5
    assert "its likelihood is not finite" in result.output


def test_an_unfinished_line_does_not_count(tmp_path: Path) -> None:
    path, model = tmp_path / "answers.jsonl", {"projector": "a"}
    assert read_answers(path, model).answers == {}
    begin_answers(path, model)
    assert read_answers(path, model).answers == {}
    with path.open("a") as file:
        file.write('{"answer":"yes","key":"1","image":"x"}\n{"answer":"n')
    before = path.read_bytes()
    assert read_answers(path, model).answers == {"1": "yes"}
    assert path.read_bytes() == before
    begin_answers(path, model)
    assert path.read_text().endswith('"image":"x"}\n')
    assert read_answers(path, model).answers == {"1": "yes"}
    with pytest.raises(UserError, match="of another projector or LLM than its name says"):
        read_answers(path, {"projector": "b"})


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
    assert page.count("<img") == page.count("data:image") == page.count("<article")
    # Both runs together, then each run's two clients.
    assert page.count("<polyline") == 6
    assert f"{score['value']:.3f}" in page
    assert (
        f"{score['value']:.3f} ({score['low']:.3f}-{score['high']:.3f})" in (folder / "report.md").read_text()
    )


def test_stale_scores_are_not_reported(evaluated: Path, tmp_path: Path) -> None:
    config = tmp_path / "lonely.toml"
    loss = '[evaluate.benchmarks.loss]\nname = "heldout_loss"\n'
    config.write_text(evaluated.read_text().split("[evaluate.benchmarks]")[0] + loss)
    for seed in ("seed=1", "seed=2"):
        assert call("federate", config, seed).exit_code == 0
        if seed == "seed=1":
            assert call("evaluate", config, seed).exit_code == 0
            assert call("report", config, seed).exit_code == 0
    result = call("report", config, "seed=2")
    assert result.exit_code == 2
    assert "lonely, loss: 12 answers are missing" in result.output


def test_runs_of_other_benchmarks_are_reported_together(evaluated: Path, tmp_path: Path) -> None:
    config = tmp_path / "fewer.toml"
    pope = f'pope = {{ name = "pope", questions = {{ random = "{evaluated.parent}/pope.json" }} }}\n'
    config.write_text(
        evaluated.read_text().split("[evaluate.benchmarks]")[0] + f"[evaluate.benchmarks]\n{pope}"
    )
    for command in ("federate", "evaluate"):
        assert call(command, config).exit_code == 0
    judged = tmp_path / "judged.toml"
    judged.write_text(f'extends = "{evaluated}"\nseed = 6\n')
    result = CliRunner().invoke(main, ["report", str(judged), str(config)])
    assert result.exit_code == 0, result.output


def test_a_report_is_about_one_experiment(evaluated: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(f'extends = "{evaluated}"\nexperiment = "another"\n')
    result = CliRunner().invoke(main, ["report", str(evaluated), str(other)])
    assert result.exit_code == 2
    assert "another, study" in result.output
