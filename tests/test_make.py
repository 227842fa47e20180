"""The real Makefile from start to end on a shrunken world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.filterwarnings("default")


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
        environment = {
            key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")
        }
        result = subprocess.run(
            [
                "make",
                f"PYTHON={sys.executable}",
                "WORLD_OPTIONS=--silo-images 40 --heldout-images 20",
                *(goals or ("extract", "federate", "evaluate")),
            ],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
        )
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


def test_the_whole_road(house: House) -> None:
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
    assert "pipeline.cli" not in output
    assert house.products() == before


def test_touching_a_config_costs_a_check_and_changes_nothing(house: House) -> None:
    before = house.products()
    (house.root / "configs/demo.toml").touch()
    output = house.make()
    assert "Nothing to do" in output
    assert output.count("nothing to do") == 2
    assert output.count("nothing to answer") == 2
    kept = {name for name in before if not name.startswith("report/")}
    assert not changed(before, house.products()) & kept
    assert "pipeline.cli" not in house.make()


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


@pytest.mark.parametrize(
    "lost",
    [
        "features/demo/pixel.zarr/manifest.json",
        "runs/demo/fedavg/manifest.json",
        "scores/demo/fedavg/pope.json",
    ],
)
def test_what_is_lost_is_made_again(house: House, lost: str) -> None:
    path = house.root / "build" / lost
    path.unlink()
    house.make()
    assert path.is_file()
    assert "pipeline.cli" not in house.make()


def test_help_needs_nothing(tmp_path: Path) -> None:
    result = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("extract", "federate", "evaluate", "test", "world"):
        assert f"make {target}" in result.stdout


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
