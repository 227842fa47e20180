"""The real Makefile from start to end on a shrunken world."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT


def make(root: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make in a checkout, free of a make around it."""
    outer = {"MAKEFLAGS", "MAKELEVEL", "VIRTUAL_ENV", "EXPERIMENT"}
    environment = {key: value for key, value in os.environ.items() if key not in outer} | variables
    return subprocess.run(["make", *words], cwd=root, env=environment, capture_output=True, text=True)


SLOW = pytest.mark.skipif("not config.getoption('--slow')")


class House:
    """A checkout in miniature: the real Makefile and packages, few images, few rounds."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
        for package in ("pipeline", "extract", "federate", "evaluate"):
            (root / package).symlink_to(ROOT / package)
        (root / "configs/demo").mkdir(parents=True)
        (root / "configs/demo.mk").write_bytes((ROOT / "configs/demo.mk").read_bytes())
        demo = (ROOT / "configs/demo.toml").read_text()
        (root / "configs/demo.toml").write_text(demo.replace("rounds = 12", "rounds = 2"))
        for name in ("fedavg", "local_only"):
            self.add(name)

    def add(self, name: str) -> None:
        source = ROOT / "configs/demo" / f"{name}.toml"
        (self.root / "configs/demo" / f"{name}.toml").write_bytes(source.read_bytes())

    def make(self, *goals: str) -> str:
        """What make printed; `goals` may hold variables, too."""
        words = goals if {"extract", "ablate"} & {*goals} else ("extract", "federate", "evaluate", *goals)
        small = "WORLD_OPTIONS=--silo-images 40 --heldout-images 20"
        result = make(self.root, f"PYTHON={sys.executable}", small, *words)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def products(self) -> dict[str, int]:
        """Modification times of everything that a stage delivers."""
        files = [
            file
            for folder in ("features", "runs", "scores", "report")
            for file in (self.root / "build" / folder).rglob("*")
            if file.is_file() and file.name != ".checked"
        ]
        return {str(file.relative_to(self.root / "build")): file.stat().st_mtime_ns for file in files}

    def report(self) -> dict:
        return json.loads((self.root / "build/report/demo/report.json").read_text())


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    made = House(tmp_path_factory.mktemp("house"))
    made.make()
    return made


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_the_whole_pipeline(house: House) -> None:
    report = house.report()
    assert report["experiment"] == "demo"
    assert set(report["runs"]) == {"fedavg", "local_only"}
    for run in report["runs"].values():
        assert set(run["benchmarks"]) == {"loss", "captions", "pope", "vqa"}
        assert run["benchmarks"]["pope"]["accuracy"]["n"] == 80
    assert (house.root / "build/report/demo/report.html").stat().st_size > 10_000


def test_a_second_run_does_nothing(house: House) -> None:
    before = house.products()
    output = house.make()
    assert "-m fedcmp" not in output
    assert house.products() == before


@SLOW
def test_touching_a_config_costs_a_check_and_changes_nothing(house: House) -> None:
    before = house.products()
    (house.root / "configs/demo.toml").touch()
    output = house.make()
    assert "Nothing to do" in output
    assert output.count("nothing to do") == 2
    assert output.count("nothing to answer") == 2
    kept = {name for name in before if not name.startswith("report/")}
    assert not changed(before, house.products()) & kept
    assert "-m fedcmp" not in house.make()


def test_a_new_version_of_the_program_is_a_reason_to_check(house: House) -> None:
    commands = house.make("--dry-run", "--what-if=federate/strategies/fedavg.py")
    for stage in ("extract", "federate", "evaluate"):
        assert f"-m fedcmp {stage} configs/demo" in commands


def test_a_new_variant_builds_itself_and_the_report(house: House) -> None:
    before = house.products()
    house.add("fedcmp")
    house.make()
    new = changed(before, house.products())
    assert new
    assert all(name.startswith(("runs/demo/fedcmp/", "scores/demo/fedcmp/", "report/")) for name in new)
    assert set(house.report()["runs"]) == {"fedavg", "local_only", "fedcmp"}
    (house.root / "configs/demo/fedcmp.toml").unlink()
    house.make()
    assert set(house.report()["runs"]) == {"fedavg", "local_only"}


PRODUCTS = ("runs/demo/fedavg/manifest.json", "scores/demo/local_only/pope.json", "report/demo/report.html")


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(PRODUCTS, id="of three stages"),
        *(pytest.param((name,), id=name, marks=SLOW) for name in PRODUCTS),
        pytest.param(("features/demo/pixel.zarr/manifest.json",), id="a cache", marks=SLOW),
    ],
)
def test_what_is_lost_is_made_again(house: House, lost: tuple[str, ...]) -> None:
    paths = [house.root / "build" / name for name in lost]
    for path in paths:
        path.unlink()
    house.make()
    assert all(path.is_file() for path in paths)
    assert "-m fedcmp" not in house.make()


@SLOW
def test_an_experiment_may_extend_another(house: House) -> None:
    before = house.products()
    mine = house.root / "configs/mine.toml"
    mine.write_text(
        'extends = "demo.toml"\n[federate]\nrounds = 1\n[evaluate.benchmarks.again]\nname = "heldout_loss"\n'
    )
    output = house.make("EXPERIMENT=mine")
    new = changed(before, house.products())
    assert all("/mine/" in name for name in new), "the caches of the file that it extends are its own"
    assert "Nothing to do" in output
    report = json.loads((house.root / "build/report/mine/report.json").read_text())
    assert set(report["runs"]["mine"]["benchmarks"]) == {"loss", "captions", "pope", "vqa", "again"}
    before = house.products()
    for name in ("again", "vqa"):  # one of its own, one of the other file's
        (house.root / f"build/scores/mine/mine/{name}.json").unlink()
    house.make("EXPERIMENT=mine")
    assert house.products().keys() == before.keys()
    mine.unlink()


@SLOW
def test_a_file_that_is_extended_counts_as_changed(house: House) -> None:
    (house.root / "configs/mine.mk").write_text("INPUTS := $(INPUTS)\n")
    mine, below = house.root / "configs/mine.toml", house.root / "configs/below.toml"
    below.write_text('extends = "demo.toml"\n[federate]\nrounds = 1\n')
    mine.write_text('extends = "below.toml"\n')
    house.make("extract", "federate", "EXPERIMENT=mine")
    assert "fedcmp federate" not in house.make("extract", "federate", "EXPERIMENT=mine")
    below.write_text('extends = "demo.toml"\n[federate]\nrounds = 2\n')
    assert "because" in house.make("extract", "federate", "EXPERIMENT=mine")
    for file in (mine, below, mine.with_suffix(".mk")):
        file.unlink()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('extends = "../demo.toml"\nfeatures = "build/other"\n', ["odd.toml", "features differs"]),
        ('extends = "../demo.toml"\nrun = "fedavg"\n', ["odd.toml", "'fedavg'", "rename one"]),
        ('extends = "../demo.toml"\n[federate]\nruonds = 2\n', ["odd.toml", "'rounds'"]),
        ('extends = "../gone.toml"\n', ["gone.toml: no such file"]),
    ],
)
def test_a_mistake_in_a_run_stops_make_with_one_line(house: House, text: str, parts: list[str]) -> None:
    odd = house.root / "configs/demo/odd.toml"
    odd.write_text(text)
    result = make(house.root, f"PYTHON={sys.executable}", "extract")
    odd.unlink()
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("fedcmp: ")]
    for part in parts:
        assert part in line
    assert "Traceback" not in result.stderr
    house.make()


@pytest.mark.parametrize(
    "name", ["my features", "cost$HOME", "a#b", "a:b", "100%", "a;b", "a=b", "a'b", "a*b", "~x"]
)
def test_make_is_told_no_name_that_it_would_misread(house: House, name: str) -> None:
    config = house.root / "configs/named.toml"
    config.write_text(f'extends = "demo.toml"\nfeatures = "build/{name}"\n')
    result = make(house.root, f"PYTHON={sys.executable}", "extract", "EXPERIMENT=named")
    config.unlink()
    assert result.returncode == 2
    assert f"build/{name}" in result.stderr
    assert not any((house.root / "build").glob("*named*"))


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=SLOW)])
def test_unusual_names_that_make_can_take(house: House, really: bool) -> None:
    folder = house.root / "build/köln+2 @home".replace(" ", "_")
    (house.root / "configs/2026.toml").write_text(
        f'extends = "demo.toml"\nexperiment = "x"\nfeatures = "build/{folder.name}"\nrun = "v1.0_b-2"\n'
    )
    if really:
        house.make("extract", "EXPERIMENT=2026")
        assert (folder / "pixel.zarr/manifest.json").is_file()
    result = make(
        house.root, f"PYTHON={sys.executable}", "--dry-run", "extract", "federate", "EXPERIMENT=2026"
    )
    assert result.returncode == 0, result.stderr
    assert f"build/{folder.name}/" in result.stdout
    assert "build/runs/2026/v1.0_b-2/.checked" in result.stdout
    (house.root / "configs/2026.toml").unlink()


def test_help_needs_nothing(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for name in ("Makefile", "configs/demo.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    result = make(tmp_path, "help", PATH="/usr/bin:/bin")
    assert result.returncode == 0
    for target in ("extract", "federate", "evaluate", "test", "world"):
        assert f"make {target}" in result.stdout
    assert not (tmp_path / ".venv").exists()
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("uv", [True, False])
def test_the_first_make_installs_and_goes_on(tmp_path: Path, uv: bool) -> None:
    """The real Makefile with an installer that only writes down what it is asked for."""
    house = House(tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    interpreter = (
        f'#!/bin/sh\ncase "$*" in\n"-m venv .venv") mkdir -p .venv/bin && cp $0 .venv/bin/python;;\n'
        f'"-m pip install"*" uv") echo "$@" >> asked; {"cp $0 .venv/bin/uv" if uv else "exit 1"};;\n'
        f'*"pip install"*) echo "$@" >> asked;;\n*) exec {sys.executable} "$@";;\nesac\n'
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python3").write_text(interpreter)
    (tools / "python3").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    result = make(tmp_path, "--dry-run", "extract", "federate", PATH=path)
    assert result.returncode == 0, result.stderr
    assert "fedcmp extract configs/demo.toml" in result.stdout
    assert "fedcmp federate configs/demo/fedavg.toml" in result.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert "uv" in asked[0].split()
    assert all("-c constraints.txt" in line for line in asked)
    assert len(asked) == 2
    assert asked[1].startswith("pip install" if uv else "-m pip install")
    assert not any("dev" in line for line in asked), "tools of developers are not for everybody"
    assert ("takes longer" in result.stdout) == (not uv)
    make(tmp_path, "--dry-run", "extract", PATH=path)
    assert len((tmp_path / "asked").read_text().splitlines()) == len(asked), "once is enough"
    make(tmp_path, ".venv/.tools", PATH=path)
    assert "dev" in (tmp_path / "asked").read_text()
    assert house.root == tmp_path


def test_constraints_pin_what_is_needed_for_every_system() -> None:
    text = (ROOT / "constraints.txt").read_text()
    pins = {
        line.split("==")[0]: line for line in text.splitlines() if line.strip() and not line.startswith("#")
    }
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^ ;]+( ; .+)?", line) for line in pins.values())
    assert not any(name.startswith(("nvidia", "triton", "cuda")) for name in pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for wanted in (*project["dependencies"], *extras["dev"], *extras["flower"], *extras["privacy"]):
        name = re.match(r"[A-Za-z0-9._-]+", wanted)
        assert name is not None
        assert name[0].lower().replace("_", "-") in pins or name[0] == "fedcmp"


@SLOW
def test_an_ablation_writes_its_data_and_its_tables(house: House) -> None:
    configs = house.root / "configs"
    (configs / "scenarios").mkdir()
    for name in ("base", "many"):
        text = (ROOT / f"configs/scenarios/{name}.toml").read_text()
        (configs / f"scenarios/{name}.toml").write_text(text.replace("rounds = 12", "rounds = 4"))
    (configs / "ablations.mk").write_bytes((ROOT / "configs/ablations.mk").read_bytes())
    (configs / "ablations").mkdir()
    (configs / "ablations/few.toml").write_text(
        'name = "few"\nseeds = [0, 1]\nscenarios = { many = "configs/scenarios/many.toml" }\n'
        'set = ["memo.path=build/memo"]\n[strategies]\nfedavg = {}\nfedcmp = {}\nscaffold = {}\n'
    )
    small = "LAB_OPTIONS=--silo-images 48 --heldout-images 20 --validation-images 9"
    options = ("ABLATION=few", "SCENARIOS=many", small)
    house.make("ablate", *options)
    report = (house.root / "build/ablations/few.md").read_text()
    assert report.count("| scaffold |") == 2
    rows = (house.root / "build/runs/many-1/fedcmp-seed1/history.jsonl").read_text().splitlines()
    clients = [json.loads(row)["client"] for row in rows if json.loads(row)["client"]]
    assert len(clients) == len(set(clients)) == 24
    before = house.products()
    assert "world write" not in house.make("ablate", *options)
    assert house.products() == before
