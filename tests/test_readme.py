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

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.arithmetic.updates import Update
from fedcmp.federate.strategies.base import STRATEGIES
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.options import Component

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_strategy_of_the_readme_works(extracted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    known = {name: STRATEGIES._classes[name] for name in STRATEGIES.names()}
    monkeypatch.setattr(STRATEGIES, "_classes", known)
    linted = subprocess.run(
        [
            sys.executable,
            "-m",
            "ruff",
            "check",
            "--stdin-filename",
            "federate/strategies/majority_vote.py",
            "-",
        ],
        input=code,
        text=True,
        capture_output=True,
        cwd=ROOT,
    )
    assert linted.returncode == 0, linted.stdout
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    vote = STRATEGIES.build(Component(name="majority_vote"), "federate.strategy")
    clients = [
        Update(name, {"w": torch.tensor([value, -value])}, 1)
        for name, value in zip("abc", (1.0, 9.0, -2.0), strict=True)
    ]
    fused = vote.aggregate({"w": torch.zeros(2)}, clients, {}).state["w"]
    assert fused.tolist() == pytest.approx([0.01, -0.01])
    words = ["federate", str(extracted), "--set", "run=readme"]
    words += ["--set", "federate.strategy.name=majority_vote"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output


def test_the_configurations_of_the_readme_are_valid(tmp_path: Path) -> None:
    clinics, vote = blocks("toml")
    assert Experiment.model_validate(tomllib.loads(clinics) | {"run": "x"}).federate.rounds == 10
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo.toml").write_bytes((ROOT / "configs/demo.toml").read_bytes())
    (tmp_path / "demo/vote.toml").write_text(vote)
    assert load(tmp_path / "demo/vote.toml").federate.strategy.name == "majority_vote"


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
