"""The first minutes: an experiment file from a folder, and the demo in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, picture, write_llava, write_shard
from test_encoders import clip_and_open

from fedcmp.cli import main
from fedcmp.components import load

__all__ = ["clip_and_open"]


def init(*words: str) -> Result:
    return CliRunner().invoke(main, ["init", *words])


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_dir: Path, llama_dir: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    write_llava(tmp_path / "data/berlin", 12)
    for number in range(2):
        sample = {"__key__": "0", "png": picture(number), "txt": b"a scan"}
        write_shard(tmp_path / f"data/lyon/{number:05}.tar", [sample])
    (tmp_path / "data/oslo").mkdir()
    for number in range(4):
        (tmp_path / f"data/oslo/{number}.png").write_bytes(picture(number))
        (tmp_path / f"data/oslo/{number}.txt").write_text("a scan")
    shutil.copytree(clip_dir, tmp_path / "data/models/clip")
    shutil.copytree(llama_dir, tmp_path / "data/models/llama")
    return tmp_path


def test_what_lies_in_a_folder_becomes_an_experiment(data: Path) -> None:
    result = init("data", "--out", "own.toml")
    assert result.exit_code == 0, result.output
    assert "3 silos, 1 encoders, 1 LLMs" in result.output
    experiment = load(data / "own.toml")
    assert {name: source.name for name, source in experiment.extract.silos.items()} == {
        "berlin": "llava_json",
        "lyon": "webdataset",
        "oslo": "image_folder",
    }
    done = CliRunner().invoke(main, ["extract", "own.toml"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    trained = ["federate", "own.toml", "--set", "federate.rounds=1", "--set", "federate.batch_size=1"]
    assert CliRunner().invoke(main, trained, catch_exceptions=False).exit_code == 0
    again = init("data", "--out", "own.toml")
    assert again.exit_code == 2
    assert "own.toml: is there already" in again.output


def test_names_are_such_as_experiment_files_may_have(data: Path) -> None:
    write_llava(data / "data/_Klinikum München (rechts der Isar)", 3)
    write_llava(data / "data/病院", 3)
    refused = init("data", "--out", "mein Versuch.toml")
    assert refused.exit_code == 2
    assert "give a name such as mein-Versuch.toml" in refused.output
    assert init("data").exit_code == 0
    experiment = load(data / "experiment.toml")
    assert {"Klinikum-Munchen-rechts-der-Isar", "silo"} < set(experiment.federate.silos)


def test_models_of_every_kind_are_known(data: Path, clip_and_open: tuple[Path, Path]) -> None:
    shutil.copytree(clip_and_open[1], data / "data/models/open")
    (data / "data/models/uni").mkdir()
    (data / "data/models/uni/config.json").write_text(json.dumps({"architecture": "vit_large_patch16_224"}))
    (data / "data/models/bert").mkdir()
    (data / "data/models/bert/config.json").write_text(json.dumps({"model_type": "bert"}))
    (data / "data/tiny.gguf").write_bytes(b"GGUF")
    result = init("data")
    text = (data / "experiment.toml").read_text()
    assert '# Also found: name = "open_clip", model = "local-dir:data/models/open"' in text
    assert '# Also found: name = "timm", model = "local-dir:data/models/uni"' in text
    assert "not used: data/models/bert: a model of type 'bert'" in result.output
    assert "fedcmp convert data/tiny.gguf" in result.output


def test_an_empty_folder_gives_a_file_to_fill_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.json").write_text('{"image": 3}')
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "lost.jsonl").write_text('{"image": "a.png", "caption": "a scan"}\n')
    result = init()
    assert result.exit_code == 0
    assert "lost.jsonl: its first picture, a.png, is in no folder beside it" in result.output
    assert (tmp_path / "experiment.toml").read_text().count("# None was found") == 3
    assert load(tmp_path / "experiment.toml").federate.silos == ("berlin",)
    assert "no such folder" in init("nowhere", "--out", "other.toml").output


def test_the_demo_is_written_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["demo", "tour", "--silo-images", "8", "--only-write"]
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    for file in sorted((ROOT / "configs/demo").glob("*.toml")):
        assert (tmp_path / "tour/configs/demo" / file.name).is_file()
    assert len(list((tmp_path / "tour/build/world/silos").iterdir())) == 6
