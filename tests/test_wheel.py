"""What is installed is one package, which works from any directory and beside other people's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel of a clean checkout holds."""
    pytest.importorskip("setuptools", "77")
    place = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (place / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, place / "checkout" / name, follow_symlinks=False)
    code = "from setuptools.build_meta import build_wheel; build_wheel('..')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=place / "checkout"
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def run(installed: Path, cwd: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_one_package(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"fedcmp"}
    checkout = {str(path.relative_to(ROOT)) for path in (ROOT / "federate").rglob("*.py")}
    wheel = {
        str(path.relative_to(installed / "fedcmp")) for path in (installed / "fedcmp/federate").rglob("*.py")
    }
    assert wheel == checkout


def test_the_demo_runs_from_another_directory(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "-c", "import fedcmp.pipeline; print(fedcmp.pipeline.__file__)")
    assert where.startswith(str(installed))
    run(installed, tmp_path, "-m", "fedcmp", "demo", "tour", "--silo-images", "16", "--only-write")
    tour = tmp_path / "tour"
    run(installed, tour, "-m", "fedcmp", "extract", "configs/demo.toml")
    short = ("configs/demo/fedcmp.toml", "--set", "federate.rounds=1")
    run(installed, tour, "-m", "fedcmp", "federate", *short)
    said = run(installed, tour, "-m", "fedcmp", "evaluate", *short, "--benchmark", "loss")
    assert "loss: loss" in said
    assert (tour / "build/runs/demo/fedcmp/projector.safetensors").is_file()


def test_another_file_is_not_overwritten(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.toml").write_text("mine = true\n")
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-m", "fedcmp", "demo", "."],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "configs/demo.toml: another file is there; give another folder" in done.stderr
    assert (tmp_path / "configs/demo.toml").read_text() == "mine = true\n"


def test_hugging_faces_evaluate_lives_beside_it(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = (
        "import sys, evaluate\n"
        "assert callable(evaluate.load) and 'fedcmp' not in evaluate.__file__, evaluate.__file__\n"
        "import fedcmp.evaluate.run\n"
        "assert fedcmp.evaluate.run.__file__ != evaluate.__file__\n"
    )
    run(installed, tmp_path, "-c", code)
    code = (
        "import sys; from click.testing import CliRunner; from fedcmp.cli import main\n"
        "assert CliRunner().invoke(main, ['evaluate', '--help']).exit_code == 0\n"
        "heavy = {'evaluate', 'datasets', 'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run(installed, tmp_path, "-c", code)
