"""The stages from Python do what the commands do."""

from __future__ import annotations

import builtins
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

import fedcmp
from fedcmp.cli import main
from fedcmp.pipeline.errors import UserError
from fedcmp.study import Study


@pytest.fixture(scope="module")
def study(extracted: Path) -> Study:
    """A run that is trained and evaluated from Python."""
    study = fedcmp.load(extracted, {"run": "python", "federate.strategy.name": "fedcmp"})
    study.federate()
    study.evaluate()
    return study


def test_it_is_the_run_that_the_command_makes(study: Study, extracted: Path) -> None:
    words = ["--set", "run=command", "--set", "federate.strategy.name=fedcmp"]
    for command in ("federate", "evaluate"):
        done = CliRunner().invoke(main, [command, str(extracted), *words])
        assert done.exit_code == 0, done.output
    here, there = study.experiment.run_path, study.experiment.run_path.with_name("command")
    name = "projector.safetensors"
    assert (here / name).read_bytes() == (there / name).read_bytes()
    theirs = fedcmp.load(extracted, {"run": "command", "federate.strategy.name": "fedcmp"}).evaluate()
    assert dict(study.evaluate()) == dict(theirs)


def test_a_dict_is_as_good_as_a_file(study: Study, extracted: Path) -> None:
    tables = tomllib.loads(extracted.read_text())
    changes = {"run": "python", "federate.strategy": {"name": "fedcmp"}}
    assert fedcmp.load(tables, changes).experiment == study.experiment


def test_values_are_python_values(extracted: Path) -> None:
    changes: dict[str, Any] = {"federate.rounds": 3, "evaluate.images": Path("/x"), "federate.silos": ["lab"]}
    experiment = fedcmp.load(extracted, changes).experiment
    assert experiment.federate.rounds == 3
    assert experiment.evaluate.images == Path("/x")
    assert experiment.federate.silos == ("lab",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federate.round": 3}, "unknown key 'federate.round'; did you mean 'rounds'"),
        ({"federate.rounds": "many"}, "federate.rounds = 'many'"),
        ({"federate.strategy.name": "fedagv"}, "did you mean 'fedavg'"),
        ({"extract.encoder.pol": 2}, "did you mean 'pool'"),
    ],
)
def test_mistakes_are_one_line(extracted: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        fedcmp.load(extracted, changes)
    assert "\n" not in str(error.value)


def test_caches_hold_arrays(study: Study) -> None:
    caches = study.extract("lab")
    assert list(caches) == ["lab"]
    features = caches["lab"].tensor([0, 1])
    assert features.shape == (2, caches["lab"].patches, caches["lab"].d_vision)


def test_a_run_holds_its_history_and_projector(study: Study) -> None:
    run = study.federate()
    assert run.path == study.experiment.run_path
    assert {row["client"] for row in run.history} == {None, *study.experiment.federate.silos}
    cache = study.extract("lab")["lab"]
    tokens = run.projector()(cache.tensor([0]).float())
    assert tokens.ndim == 3
    assert torch.isfinite(tokens).all()


def test_scores_are_those_of_the_files(study: Study) -> None:
    scores = study.evaluate("loss")
    content = scores.contents["loss"]["metrics"]["loss"]
    assert scores["loss: loss"].value == content["value"]
    assert len(scores) == len([*scores])
    assert f"{content['value']:.3f} (" in repr(scores)
    with pytest.raises(KeyError):
        scores["loss: los"]


def test_rows_become_frames(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    frame = study.evaluate().frame()
    assert list(frame.columns) == ["benchmark", "metric", "value", "low", "high", "n"]
    assert len(frame) == len(study.evaluate())
    assert isinstance(fedcmp.frame(study.federate().history), pandas.DataFrame)
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install pandas"):
        fedcmp.frame([])


def test_runs_are_compared(study: Study, extracted: Path) -> None:
    other = fedcmp.load(extracted, {"run": "other"})
    other.federate()
    other.evaluate()
    rows = study.compare(other)
    assert rows[0].ours == study.evaluate()[rows[0].metric].value
    assert rows[0].theirs == other.evaluate()[rows[0].metric].value
    assert (study.report(other) / "report.html").is_file()
    with pytest.raises(UserError, match="pairs"):
        study.compare()


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, fedcmp\n"
        "assert not {'torch', 'numpy', 'pydantic', 'click', 'pandas'} & set(sys.modules)\n"
        "assert set(fedcmp.__all__) <= {*dir(fedcmp), *fedcmp.__all__}\n"
        "try: fedcmp.laod\n"
        "except AttributeError as error: assert 'laod' in str(error)\n"
        "else: raise SystemExit(1)\n"
        "assert callable(fedcmp.load) and callable(fedcmp.demo)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
