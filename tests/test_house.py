"""The rules of the house, read from the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = ("extract", "federate", "evaluate")
PACKAGES = ("pipeline", *STAGES)
# The package's own folder holds links to the others, which `rglob` does not follow.
DOORS = sorted(
    file for file in (ROOT / "fedcmp").rglob("*.py") if file.relative_to(ROOT).parts[1] not in PACKAGES
)
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")) + DOORS


def module(file: Path) -> str:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.startswith("fedcmp") else f"fedcmp.{name}"


MODULES = {module(file): file for file in FILES}


def nodes(file: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(file.read_text()))


def imports(file: Path) -> set[str]:
    """Everything that a file imports, anywhere in it; of our own, modules rather than names in them."""
    found = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= parts or {node.module}
    return found


def at_once(file: Path) -> set[str]:
    """Our modules that importing a file imports: not those in functions or for type checkers."""
    tree, found = ast.parse(file.read_text()), set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= parts or {node.module} & set(MODULES)
    return found


def named(file: Path) -> set[str]:
    """Our modules that a file names in strings which are nothing else, as `import_module` takes them."""
    strings = {node.value for node in nodes(file) if isinstance(node, ast.Constant)}
    return {text.partition(":")[0] for text in strings if isinstance(text, str)} & (set(MODULES) - {"fedcmp"})


def stage(name: str) -> str:
    """`extract` of `fedcmp.extract.silo`; `doors` of what is above the stages."""
    part = name.split(".")[1] if name.count(".") else ""
    return part if part in PACKAGES else "doors"


def test_there_are_files() -> None:
    assert len(FILES) > 200
    assert len(DOORS) > 15


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_imported_upward_or_sideways(name: str) -> None:
    """The doors may use every stage, a stage the pipeline, and the pipeline nobody, by string neither."""
    file = MODULES[name]
    used = {stage(each) for each in imports(file) | named(file) if each.split(".")[0] == "fedcmp"}
    here = stage(name)
    if here != "doors":
        assert used <= {here, "pipeline"}
    assert not {each.split(".")[0] for each in imports(file)} & set(PACKAGES)


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: at_once(file) - {name} for name, file in MODULES.items()}
    list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_long(name: str) -> None:
    assert len(MODULES[name].read_text().splitlines()) <= 400


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_one_name(package: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", f"import {package}"], capture_output=True, text=True, cwd=ROOT
    )
    assert f"import fedcmp.{package} instead of {package}" in result.stderr


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("zarr", ["pipeline/cache/"]),
        ("open_clip", ["extract/encoders/"]),
        ("fsspec", ["pipeline/remote.py"]),
        ("h5py", ["extract/sources/hdf5.py", "pipeline/handover/hdf5.py"]),
        ("lmms_eval", ["fedcmp/lmms/model.py"]),
        (
            "pyarrow",
            ["evaluate/official/parquet.py", "extract/sources/arrow.py", "extract/sources/columns.py"],
        ),
        ("flwr", ["federate/engines/flower/", "fedcmp/flower_app.py"]),
        ("h11", ["federate/engines/flower/gate.py"]),
        (
            "cryptography",
            [
                "federate/secure/masks.py",
                "federate/engines/flower/keys.py",
                "pipeline/handover/signature.py",
            ],
        ),
        ("opacus", []),
        ("webdataset", ["pipeline/world/write.py"]),
    ],
)
def test_only_its_home_imports(package: str, homes: list[str]) -> None:
    for file in FILES:
        if any(name.split(".")[0] == package for name in imports(file)):
            assert str(file.relative_to(ROOT)).startswith(tuple(homes))


def test_torchs_collectives_have_one_home() -> None:
    for file in FILES:
        if any(name.startswith(("torch.distributed", "torch._C")) for name in imports(file)):
            assert str(file.relative_to(ROOT)).startswith(("federate/ranks/", "pipeline/ranks.py"))


def test_the_world_is_special_nowhere_else() -> None:
    for name, file in MODULES.items():
        if "world" not in name and name not in ("fedcmp", "fedcmp.commands.demo"):
            assert not {each for each in imports(file) if each.startswith("fedcmp.pipeline.world")}


def test_strategies_do_no_io() -> None:
    forbidden = {"logging", "os", "pathlib", "io", "random", "rich", "click", "fedcmp.pipeline.console"}
    for folder in ("strategies", "arithmetic"):
        for file in (ROOT / "federate" / folder).glob("*.py"):
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
