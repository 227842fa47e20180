"""Every benchmark from official files to answers, scores and comparisons, with the tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from official import WRITERS
from test_benchmarks import FILES, items_of

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.evaluate.benchmarks.base import BENCHMARKS


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(scope="module")
def household(extracted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with every benchmark, its pictures extracted, and two runs trained."""
    root = tmp_path_factory.mktemp("official")
    tables = [f'extends = "{extracted}"', f'build = "{root}/build"', f'features = "{root}/features"']
    (root / "features").mkdir()
    for silo in ("clinic", "lab"):
        (root / f"features/{silo}.zarr").symlink_to(extracted.parent / f"features/{silo}.zarr")
    for name in FILES:
        (root / name).mkdir()
        options = {"max_new_tokens": 4, **WRITERS[name](root / name)}
        tables.append(f"[evaluate.benchmarks.{name}]\nname = '{name}'")
        for key, value in options.items():
            if isinstance(value, dict):
                inner = ", ".join(f"{split} = '{path}'" for split, path in value.items())
                tables.append(f"{key} = {{ {inner} }}")
            else:
                tables.append(f"{key} = {value if isinstance(value, int) else repr(str(value))}")
    config = root / "official.toml"
    config.write_text("\n".join(tables) + "\n")
    words = [word for name in FILES for word in ("--benchmark", name)]
    result = call("extract", config, *words)
    assert result.exit_code == 0, result.output
    for run, seed in (("one", 0), ("other", 1)):
        (root / f"{run}.toml").write_text(f'extends = "official.toml"\nseed = {seed}\n')
        trained = call("federate", root / f"{run}.toml")
        assert trained.exit_code == 0, trained.output
    return root


@pytest.fixture(scope="module")
def answered(household: Path) -> Path:
    words = [word for name in FILES for word in ("--benchmark", name)]
    result = call("evaluate", household / "one.toml", household / "other.toml", *words)
    assert result.exit_code == 0, result.output
    return household


def test_images_of_benchmarks_are_cached_once_and_without_texts(household: Path) -> None:
    from fedcmp.pipeline.cache import FeatureCache

    for name in FILES:
        cache = FeatureCache(household / f"features/{name}.zarr")
        assert cache.texts == 0
        assert not cache.manifest["failures"]
    again = call("extract", household / "one.toml", "--benchmark", "mme")
    assert "Nothing to do" in again.output


def answers_of(root: Path, name: str, run: str = "one") -> list[dict[str, Any]]:
    """Lines of saved answers that a benchmark asked for, in the order in which they came."""
    (path,) = (root / f"build/scores/study/{run}/answers").glob("projector.*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [line for line in lines if line["benchmark"] == name]


@pytest.mark.parametrize("name", FILES)
def test_from_official_files_to_scores(name: str, answered: Path) -> None:
    benchmark = BENCHMARKS.build(load(answered / "one.toml").evaluate.benchmarks[name], name)
    items = items_of(benchmark)
    content = json.loads((answered / f"build/scores/study/one/{name}.json").read_text())
    assert content["counts"]["items"] == len(items)
    assert not any(content["counts"][what] for what in ("missing images", "bad entries", "failed items"))
    assert content["settings"] == benchmark.settings
    for score in content["metrics"].values():
        assert score["low"] <= score["high"]
    # Equal questions about equal pictures are asked once.
    keys = [row["key"] for row in answers_of(answered, name)]
    assert len({*keys}) == len(keys) <= len(items)
    submitted = answered / "build/scores/study/one/submissions"
    if name in ("vqav2", "mm_vet", "mmbench", "vizwiz", "captions"):
        assert list(submitted.glob(f"{name}.*"))


def test_ranking_answers_with_an_option_and_says_so(answered: Path) -> None:
    for name in ("pope", "mmbench"):
        option = f"evaluate.benchmarks.{name}.rank=true"
        before = len(answers_of(answered, name))
        result = call("evaluate", answered / "one.toml", "--benchmark", name, "--set", option)
        assert result.exit_code == 0, result.output
        rows = answers_of(answered, name)[before:]
        assert rows
        allowed = {"Yes", "No"} if name == "pope" else set("ABCD")
        assert {row["answer"] for row in rows} <= allowed
        content = json.loads((answered / f"build/scores/study/one/{name}.json").read_text())
        assert content["settings"] == {"answers": "likeliest option"}
        assert call("score", answered / "one.toml", "--benchmark", name).exit_code == 0


def test_the_likeliest_option_is_that_of_the_llms_own_losses(answered: Path, llama_dir: Path) -> None:
    import torch

    from fedcmp.pipeline.cache import FeatureCache
    from fedcmp.pipeline.models.language import FrozenLanguageModel
    from fedcmp.pipeline.models.projector import load_projector
    from fedcmp.pipeline.models.prompts import tokenise
    from fedcmp.pipeline.records import Text, Turn

    option = "evaluate.benchmarks.seed_bench.rank=true"
    before = len(answers_of(answered, "seed_bench"))
    assert (
        call("evaluate", answered / "one.toml", "--benchmark", "seed_bench", "--set", option).exit_code == 0
    )
    said = {row["id"]: row["answer"] for row in answers_of(answered, "seed_bench")[before:]}
    language = FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")
    projector, _ = load_projector(answered / "build/runs/study/one/projector.safetensors")
    cache = FeatureCache(answered / "features/seed_bench.zarr")
    benchmark = BENCHMARKS.build(load(answered / "one.toml").evaluate.benchmarks["seed_bench"], "s")
    for each in items_of(benchmark):
        losses = {}
        for letter in each.options:
            text = Text((*each.text.turns, Turn("assistant", letter)))
            sample = tokenise(text, "chat", language.tokenizer, patches=4, max_length=999)
            with torch.no_grad():
                projected = projector(cache.tensor([cache.ids.index(each.image)]).float())
                found, _ = language.token_losses(*language.collate([sample]), projected)
            losses[letter] = float(found.sum())
        best = min(losses.values())
        assert losses[str(said[each.id])] == pytest.approx(best, abs=1e-4)
    assert call("score", answered / "one.toml", "--benchmark", "seed_bench").exit_code == 0


def test_compare_prints_differences_with_their_tests(answered: Path) -> None:
    from fedcmp.evaluate.compare import compare_runs

    one, other = load(answered / "one.toml"), load(answered / "other.toml")
    names = ("pope", "mme", "vqav2", "captions", "mm_vet")
    rows = {row.metric: row for row in compare_runs([one, other], names)}
    assert {*rows} == {
        "pope: f1",
        "pope: accuracy",
        "mme: perception",
        "mme: cognition",
        "mme: total",
        "vqav2: accuracy",
        "captions: CIDEr-D",
    }
    assert rows["pope: accuracy"].mcnemar is not None
    assert rows["pope: f1"].mcnemar is None
    for row in rows.values():
        assert row.gap.value == pytest.approx(row.ours - row.theirs)
        assert row.gap.low <= row.gap.value <= row.gap.high
        assert 0 < row.gap.p <= 1
        assert row.spread is None
    same = {row.metric: row for row in compare_runs([one, one], names)}
    assert all((row.gap.value, row.gap.p) == (0, 1) for row in same.values())
    mixed = call("compare", *(answered / f"{run}.toml" for run in ("one", "other", "other", "one")))
    assert mixed.exit_code == 2
    assert "'one' has seed 0 and 'other' seed 1" in mixed.output
    result = call("compare", answered / "one.toml", answered / "other.toml", "--benchmark", "pope")
    assert result.exit_code == 0
    assert "p (Holm)" in result.output
    odd = call("compare", answered / "one.toml")
    assert odd.exit_code == 2
    assert "do not form pairs" in odd.output


def test_what_does_not_fit_or_is_damaged_is_counted(answered: Path) -> None:
    config, scores = answered / "one.toml", answered / "build/scores/study/one"
    (path,) = (scores / "answers").glob("projector.*.jsonl")
    whole = path.read_bytes()
    rows = answers_of(answered, "vizwiz")
    path.write_bytes(whole + b'{"key": "other", "answer": "x"}\n\xff\xfe{\n{"id": "a", "answer": null}\n[]\n')
    result = call("score", config, "--benchmark", "vizwiz")
    assert result.exit_code == 0, result.output
    result = call("evaluate", config, "--benchmark", "vizwiz")
    assert "3 unreadable lines" in result.output
    last = json.dumps(rows[-1]["key"]).encode()
    path.write_bytes(b"\n".join(line for line in whole.split(b"\n") if last not in line))
    result = call("score", config, "--benchmark", "vizwiz")
    assert result.exit_code == 2
    assert "1 answers are missing" in result.output
    empty = [json.dumps(row | {"answer": ""}).encode() for row in rows]
    path.write_bytes(whole + b"\n".join(empty) + b"\n")
    result = call("score", config, "--benchmark", "vizwiz")
    assert f"{len(rows)} empty answers, scored by the rule as they are" in result.output
    path.write_bytes(whole)

    hints = "--benchmark", "textvqa", "--set"
    with_room = call("evaluate", config, *hints, "evaluate.benchmarks.textvqa.max_new_tokens=3")
    assert with_room.exit_code == 0
    annotations = answered / "textvqa/TextVQA_0.5.1_val.json"
    content = json.loads(annotations.read_text())
    content["data"][0]["question"] = "What " * 3000
    changed = answered / "textvqa/long.json"
    changed.write_text(json.dumps(content))
    long = call("evaluate", config, *hints, f"evaluate.benchmarks.textvqa.annotations={changed}")
    assert long.exit_code == 0, long.output
    assert "1 failed items not scored" in long.output
    assert "its prompt has more than" in long.output
    assert json.loads((scores / "textvqa.json").read_text())["counts"]["failed items"] == 1
    again = call("evaluate", config, *hints, f"evaluate.benchmarks.textvqa.annotations={changed}")
    assert "nothing to answer" in again.output


def test_a_benchmark_without_images_says_how_to_extract_them(answered: Path, tmp_path: Path) -> None:
    config = tmp_path / "away.toml"
    pope = answered / "pope/coco_pope_random.json"
    config.write_text(
        f'extends = "{answered}/one.toml"\nrun = "one"\n[evaluate.benchmarks.away]\nname = "pope"\n'
        f"questions = {{ random = '{pope}' }}\n"
    )
    result = call("extract", config, "--benchmark", "away", "--images", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "not one image could be read" in result.output
    assert call("extract", config, "--images", tmp_path).exit_code == 2
    unknown = call("extract", config, "--benchmark", "pop", "--images", tmp_path)
    assert unknown.exit_code == 2
    assert "did you mean 'pope'" in unknown.output


def test_a_changed_caption_matches_everything_anew(answered: Path) -> None:
    """What is retrieved depends on all the rest, so nothing of it may stay."""
    path, config = answered / "retrieval/dataset_coco.json", answered / "other.toml"
    scores = answered / "build/scores/study/other/retrieval.json"
    whole, old = path.read_text(), scores.read_bytes()
    before = answers_of(answered, "retrieval", "other")
    path.write_text(whole.replace("A dog number 1.", "Something else entirely", 1))
    assert call("score", config, "--benchmark", "retrieval").exit_code == 2
    assert call("evaluate", config, "--benchmark", "retrieval").exit_code == 0
    after = answers_of(answered, "retrieval", "other")
    assert len(after) == 2 * len(before)
    assert {row["key"] for row in before}.isdisjoint(row["key"] for row in after[len(before) :])
    path.write_text(whole)
    result = call("evaluate", config, "--benchmark", "retrieval")
    assert "nothing to answer" in result.output
    assert scores.read_bytes() == old
