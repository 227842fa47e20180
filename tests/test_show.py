"""What `fedcmp show` prints is an experiment file of the same meaning, with everything written out."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT

from fedcmp.ablation.file import read_ablation
from fedcmp.cli import main
from fedcmp.components import load

CONFIGS = [
    "configs/demo.toml",
    "configs/demo/fedcmp.toml",
    "configs/llava-1.5-7b.toml",
    "configs/qwen-0.5b.toml",
]


def shown(*words: str) -> str:
    result = CliRunner().invoke(main, ["show", *words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("config", CONFIGS)
def test_it_is_an_experiment_file_that_says_all(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    text = shown(config)
    (tmp_path / "again.toml").write_text(text)
    assert shown(str(tmp_path / "again.toml")) == text, "nothing was left to add"
    written, meant = load(tmp_path / "again.toml"), load(Path(config))
    for part in ("experiment", "run", "seed", "features", "language", "sites"):
        assert getattr(written, part) == getattr(meant, part)
    given = meant.federate.strategy.model_dump()
    assert written.federate.strategy.model_dump() | given == written.federate.strategy.model_dump()


def test_defaults_of_components_are_written_out_and_what_is_given_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--set", "federate.strategy.kappa=0.5", "--set", "federate.projector.name=mlp3x_gelu"]
    tables = tomllib.loads(shown("configs/demo/fedcmp.toml", *words, "--set", "federate.rounds=5"))
    strategy = tables["federate"]["strategy"]
    assert (strategy["name"], strategy["kappa"], strategy["warmup"]) == ("fedcmp", 0.5, 1)
    assert tables["federate"]["rounds"] == 5
    assert tables["federate"]["batch_size"] == 8, "of the file that is extended"
    assert tables["federate"]["projector"] == {"name": "mlp3x_gelu"}, "the depth stands in the name"
    assert tables["extract"]["encoder"]["resize"] == "crop"


def test_urls_stay_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    url = "s3://bucket/flat/{0..3}.tar"
    words = ["--set", f"extract.silos.flat.path={url}", "--set", "features=s3://bucket/features"]
    tables = tomllib.loads(shown("configs/demo.toml", *words))
    assert tables["extract"]["silos"]["flat"]["path"] == url
    assert tables["store"] == "s3://bucket/features"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("federate.strategy.kapa=0.5", "did you mean 'kappa'"),
        ("evaluate.benchmarks.pope.qestions=1", "did you mean 'questions'"),
        ("extract.silos.flat.splt=1", "did you mean 'split'"),
        ("extract.encoder.name=transformer", "did you mean 'transformers'"),
    ],
)
def test_it_finds_mistakes_in_every_stage(override: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(main, ["show", "configs/demo/fedcmp.toml", "--set", override])
    assert result.exit_code == 2
    assert hint in result.output


def test_an_ablation_is_shown_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = Path("configs/ablations/parts.toml")
    (tmp_path / "again.toml").write_text(shown(str(config)))
    assert read_ablation(tmp_path / "again.toml") == read_ablation(config)
    (line,) = shown("configs/ablations/merging.toml", "--make").splitlines()
    assert line.startswith("EXPERIMENTS += content-0 content-1 ")
    assert "domain-101" in line.split()
    result = CliRunner().invoke(main, ["show", str(config), "--set", "seed=1"])
    assert result.exit_code == 2
    assert "takes no overrides" in result.output


def test_make_is_answered_without_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fedcmp.cli import main\n"
        "assert CliRunner().invoke(main, ['show', 'configs/demo.toml', '--make']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'zarr', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
