"""The rules of the house, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = ("extract", "federate", "evaluate")
PACKAGES = ("pipeline", *STAGES)
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def top(file: Path) -> str:
    return file.relative_to(ROOT).parts[0]


def test_there_are_files() -> None:
    assert len(FILES) > 30


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_data_flows_one_way(file: Path) -> None:
    forbidden = set(STAGES) - {top(file)}
    assert not {name for name in imports(file) if name.split(".")[0] in forbidden}


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("zarr", ["pipeline/cache/"]),
        ("open_clip", ["extract/encoders/"]),
        ("fsspec", ["pipeline/store.py"]),
        ("h5py", ["extract/sources/hdf5.py", "pipeline/handover/hdf5.py"]),
        ("lmms_eval", ["evaluate/lmms.py"]),
        ("flwr", ["federate/engines/flower.py", "federate/engines/supernode.py"]),
        ("h11", ["federate/engines/gate.py"]),
        (
            "cryptography",
            ["federate/secure/masks.py", "federate/engines/keys.py", "pipeline/handover/signature.py"],
        ),
        ("opacus", []),
        ("webdataset", ["pipeline/world/write.py"]),
    ],
)
def test_only_its_home_imports(package: str, homes: list[str]) -> None:
    for file in FILES:
        if any(name.split(".")[0] == package for name in imports(file)):
            assert str(file.relative_to(ROOT)).startswith(tuple(homes))


def test_the_world_is_special_nowhere_else() -> None:
    for file in FILES:
        if "world" not in file.parts:
            assert not {name for name in imports(file) if name.startswith("fedcmp.pipeline.world")}


def test_strategies_do_no_io() -> None:
    forbidden = {"logging", "os", "pathlib", "io", "random", "rich", "click", "fedcmp.pipeline.console"}
    for file in (ROOT / "federate" / "strategies").glob("*.py"):
        assert not imports(file) & forbidden


def test_nothing_seeds_globally() -> None:
    for file in FILES:
        if file.name != "train.py":
            assert "manual_seed(" not in file.read_text().replace("Generator().manual_seed(", "")
            assert "np.random.seed" not in file.read_text()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from fedcmp.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'zarr', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
