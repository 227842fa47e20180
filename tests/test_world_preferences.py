"""Preferences of the embedded default: a run's own answers, ranked by what the scenes are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.extract.sources import text_of
from fedcmp.pipeline.world.scenes import DOMAINS
from fedcmp.world_preferences import KINDS, agreement, ranked

CONFIGS = Path(__file__).parent.parent / "configs"
TRUTH = "a small red circle at the top left, a large blue star at the middle right."


@pytest.mark.parametrize(
    ("kind", "said", "wanted", "right"),
    [
        ("yesno", "Yes.", "yes", 1),
        ("yesno", "no", "yes", 0),
        ("short", "top left", "top left", 1),
        ("caption", TRUTH, TRUTH, 1),
        ("caption", "in the dark there is a small red circle at the top left.", TRUTH, 2 / 3),
        ("caption", "a small red circle at the top right.", TRUTH, 0),
        ("caption", "", TRUTH, 0),
    ],
)
def test_an_answer_is_as_right_as_what_it_tells(kind: str, said: str, wanted: str, right: float) -> None:
    assert agreement(kind, said, wanted) == pytest.approx(right)


def test_the_better_answer_comes_first_and_the_truth_beats_two_that_are_wrong() -> None:
    assert ranked("yesno", "yes", "no", "yes") == ("yes", "no")
    assert ranked("yesno", "yes", "no", "no") == ("yes", "no")
    assert ranked("yesno", "yes", "yes", "yes") is None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the embedded default, and preferences between its answers."""
    root = tmp_path_factory.mktemp("world")
    options = [f"build={root}/build", f"features={root}/features", "federate.rounds=2"]
    options += [f"extract.silos.{d}.path={root}/world/silos/{d}/*.tar" for d in DOMAINS]
    options += [
        f"extract.silos.heldout.{key}={root}/world/heldout{end}"
        for key, end in (("path", "/captions.json"), ("images", "/images"))
    ]
    words = [word for option in options for word in ("--set", option)]
    config = str(CONFIGS / "demo/fedavg.toml")
    few = ["--silo-images", "24", "--heldout-images", "4"]
    for command in (
        ["world", "write", f"{root}/world", *few],
        ["extract", config, *words],
        ["federate", config, *words],
        [
            "world",
            "prefer",
            config,
            f"{root}/out",
            *words,
            "--silo-preferences",
            "4",
            "--prompts",
            "5",
            "--public-preferences",
            "3",
        ],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    return root / "out"


def test_every_silo_and_kind_has_its_preferences(world: Path) -> None:
    for silo in DOMAINS:
        entries = json.loads((world / f"silos/{silo}.json").read_text())
        assert len(entries) == 4 * len(KINDS)
        texts = [text_of(entry, "train") for entry in entries]
        assert all(text.kind == "preference" for text in texts)
        assert [len(text.turns) for text in texts] == [1] * 4 + [2] * 8
        assert all((world / "silos" / silo / entry["image"]).is_file() for entry in entries)
    for kind in KINDS:
        kinds = [text_of(e, "train").kind for e in json.loads((world / f"public/{kind}.json").read_text())]
        assert kinds.count("preference") == 3
        assert len(kinds) == 8
    assert "seed" in json.loads((world / "manifest.json").read_text())


def test_the_alignment_of_the_default_reads_them() -> None:
    experiment = load(CONFIGS / "align/mor.toml")
    assert experiment.align is not None
    assert experiment.align.prompts == KINDS
    assert set(experiment.federate.silos) == set(DOMAINS)
