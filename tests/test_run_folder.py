"""A finished run is read in one way, and only what is finished is a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcmp.components import load
from fedcmp.federate.run import run
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import read_json, write_json
from fedcmp.pipeline.manifest import withdraw_manifest
from fedcmp.pipeline.models.projector import content_hash, state_of
from fedcmp.pipeline.run_folder import Run, read_history


def test_training_returns_what_lies_in_the_folder(extracted: Path, tmp_path: Path) -> None:
    experiment = load(extracted, [f"build={tmp_path}", "federate.rounds=2"])
    made = run(experiment)
    assert made == Run.find(experiment.run_path) == run(experiment)
    assert [row["round"] for row in made.history if row["client"] is None] == [0, 1]
    assert made.judged == ["projector.safetensors"]
    assert content_hash(state_of(made.projector(made.judged[0]))) in made.projectors.values()


def test_a_run_of_silos_alone_is_judged_by_their_projectors(extracted: Path, tmp_path: Path) -> None:
    words = [f"build={tmp_path}", "federate.rounds=1", "federate.strategy.name=local_only"]
    made = run(load(extracted, words))
    assert made.judged == ["silos/clinic.safetensors", "silos/lab.safetensors"]
    assert {*made.judged} < {*made.projectors}


def test_a_run_that_was_trained_again_meanwhile_gives_no_projector(extracted: Path, tmp_path: Path) -> None:
    words = [f"build={tmp_path}", "federate.rounds=0"]
    before = run(load(extracted, words))
    after = run(load(extracted, [*words, "seed=5"]))
    assert after.path == before.path
    with pytest.raises(UserError, match="trained again meanwhile"):
        before.projector("projector.safetensors")


def test_what_is_not_finished_is_no_run(extracted: Path, tmp_path: Path) -> None:
    made = run(load(extracted, [f"build={tmp_path}", "federate.rounds=1"]))
    with (made.path / "history.jsonl").open("a") as file:
        file.write('{"round": 1, "cli')
    assert read_history(made.path) == made.history != []
    manifest = read_json(made.path / "manifest.json")
    withdraw_manifest(made.path)
    assert Run.find(made.path) is None
    write_json(made.path / "manifest.json", {"format": manifest["identity"]["format"]})
    assert Run.find(made.path) is None
    write_json(made.path / "manifest.json", ["another", "program's"])
    with pytest.raises(UserError, match="not a manifest of FedCMP"):
        Run.find(made.path)
    assert read_history(tmp_path / "nowhere") == []
