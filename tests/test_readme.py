"""What the README shows is true."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from tables import vqa_rad

from fedcmp.cli import main
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.hashes import sha256_file
from fedcmp.pipeline.models.projector import load_projector

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def pasted(folder: Path) -> None:
    """What a reader of the sections on adding components writes, into files of the names given there."""
    for section in re.findall(r"^## Add an? .*?(?=^## )", README, re.DOTALL | re.MULTILINE):
        (name,) = re.findall(r"`(configs/\S+\.py)`", section)
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        (tables,) = re.findall(r"```toml\n(.*?)```", section, re.DOTALL)
        for path, text in ((name, code), (tables.split("\n")[0].removeprefix("# "), tables)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)


def done(*words: str) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_what_the_readme_adds_works(extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text, from a folder of a reader's own, through all stages."""
    pasted(tmp_path)
    monkeypatch.chdir(tmp_path)
    demo = extracted.read_text()
    assert demo.count(f'"{extracted.parent}/build"') == 1
    Path("configs/demo.toml").write_text(demo.replace(f'"{extracted.parent}/build"', '"build"'))
    Path("questions.tsv").write_text(
        "".join(f"scans/{n}.png\tIs there a dog?\t{('yes', 'No')[n % 2]}\n" for n in range(500, 512))
    )
    done("federate", "configs/demo/majority_vote.toml")
    manifest = read_json(Path("build/runs/study/majority_vote/manifest.json"))
    hashed = sha256_file(Path("configs/demo/majority_vote.py"))
    assert manifest["identity"]["federate"]["strategy"]["plugin file"] == hashed
    _, state = load_projector(Path("build/runs/study/majority_vote/projector.safetensors"))
    done("federate", "configs/demo/majority_vote.toml", "--set", "federate.rounds=0", "--set", "run=start")
    _, start = load_projector(Path("build/runs/study/start/projector.safetensors"))
    for name, after in state.items():
        votes = (after - start[name]) / 0.01
        assert torch.allclose(votes, votes.round(), atol=1e-3)
        assert votes.abs().max() <= 3.001  # as many as there are rounds
        assert bool(votes.any())
    done("federate", "configs/demo/asked.toml")
    done("evaluate", "configs/demo/asked.toml", "--benchmark", "own")
    scores = read_json(Path("build/scores/study/asked/own.json"))
    assert scores["metrics"]["accuracy"]["n"] == 12
    assert scores["made_of"]["plugin file"] == sha256_file(Path("configs/exact_match.py"))
    done("extract", "configs/colours.toml")
    cache = FeatureCache(Path("build/features/colours/clinic.zarr"))
    assert (cache.patches, cache.d_vision) == (64, 3)
    assert cache.manifest["key"]["encoder"]["plugin file"] == sha256_file(Path("configs/mean_colours.py"))
    assert len({features.numpy().tobytes() for features in cache.tensor(range(3)).float()}) == 3
    done("federate", "configs/colours.toml")
    done("evaluate", "configs/colours.toml", "--benchmark", "pope")
    assert "nothing to do" in done("federate", "configs/colours.toml")


def test_the_code_of_the_readme_is_tidy() -> None:
    for code in blocks("python"):
        assert len([line for line in code.splitlines() if line.strip()]) <= 24
        words = ["check", "--isolated", "--select", "E,F,I,B,UP", "--line-length", "110"]
        words += ["--target-version", "py311", "--config", "lint.isort.known-first-party=['fedcmp']", "-"]
        linted = subprocess.run(
            [sys.executable, "-m", "ruff", *words], input=code, text=True, capture_output=True, cwd=ROOT
        )
        assert linted.returncode == 0, linted.stdout + linted.stderr


def test_the_configurations_of_the_readme_are_valid() -> None:
    clinics, *_ = blocks("toml")
    assert Experiment.model_validate(tomllib.loads(clinics) | {"run": "x"}).federate.rounds == 10


def test_the_tree_of_the_readme_is_there() -> None:
    section = README.split("## The tree")[1]
    folder, found = "", 0
    for line in section.splitlines():
        match = re.match(r"^    (  )?(\S+)  +\S", line)
        if match:
            inside, name = match.groups()
            path = f"{folder}{name}" if inside else name
            assert (ROOT / path).exists(), path
            folder = folder if inside else name
            found += 1
    assert found > 30


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z]+@", README)


def test_a_table_alone_scores_questions_of_ones_own(extracted: Path, tmp_path: Path) -> None:
    (block,) = [each for each in blocks("toml") if "evaluate.benchmarks.ours" in each]
    vqa_rad(tmp_path)
    (tmp_path / "vqa_rad").rename(tmp_path / "ours")
    (tmp_path / "ours/VQA_RAD Dataset Public.json").rename(tmp_path / "ours/questions.json")
    (tmp_path / "ours/VQA_RAD Image Folder").rename(tmp_path / "ours/images")
    config = tmp_path / "clinics.toml"
    places = f'build = "{tmp_path}/build"\nfeatures = "{tmp_path}/features"\n'
    config.write_text(f'extends = "{extracted}"\n{places}' + block.replace("/data/", f"{tmp_path}/"))
    (tmp_path / "features").mkdir()
    for silo in ("clinic", "lab"):
        (tmp_path / f"features/{silo}.zarr").symlink_to(extracted.parent / f"features/{silo}.zarr")
    done("extract", str(config), "--benchmark", "ours")
    done("federate", str(config))
    output = done("evaluate", str(config), "--benchmark", "ours")
    for metric in ("accuracy", "closed accuracy", "open recall", "accuracy image_organ CHEST"):
        assert f"ours: {metric}" in output
