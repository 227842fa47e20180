"""The identity of a model is that of the bytes that are loaded: no more files, no fewer."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from itertools import chain, combinations
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from conftest import ROOT
from safetensors.torch import load_file, save_file

from fedcmp.cli import main
from fedcmp.extract.encoders.open_clip import OpenClip
from fedcmp.extract.encoders.transformers import Transformers
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.pretrained import read_weights
from fedcmp.pipeline.models.saved_model import LANGUAGE_FILES, TOKENIZER_FILES, model_hashes, weight_files

MARKER = "model.norm.weight"
SOURCES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def write_source(folder: Path, name: str, state: dict[str, torch.Tensor], value: float) -> None:
    """Weights as one of the forms that transformers knows; the marker says which."""
    state = {key: tensor.clone() for key, tensor in state.items()}
    state[MARKER] = torch.full_like(state[MARKER], value)
    whole = name.removesuffix(".index.json")

    def save(part: dict[str, torch.Tensor], file: str) -> None:
        if file.endswith(".bin"):
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})

    if whole == name:
        save(state, name)
        return
    stem, suffix = whole.rsplit(".", 1)
    shards = [f"{stem}-{number:05d}-of-00002.{suffix}" for number in (1, 2)]
    keys = sorted(state)
    parts = [keys[::2], keys[1::2]]
    weight_map = {}
    for shard, part in zip(shards, parts, strict=True):
        save({key: state[key] for key in part}, shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def subsets() -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(SOURCES, size) for size in range(1, len(SOURCES) + 1))


@pytest.fixture
def bare(llama_dir: Path, tmp_path: Path) -> Path:
    """A saved model without its weights."""
    out = tmp_path / "llm"
    shutil.copytree(llama_dir, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


@pytest.fixture(scope="module")
def weights(llama_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(llama_dir / "model.safetensors")


def loaded_marker(folder: Path) -> float:
    model = FrozenLanguageModel(folder, dtype="float32", device="cpu").model
    return float(model.get_decoder().norm.weight[0])


@pytest.mark.parametrize("present", list(subsets()), ids=lambda present: "+".join(map(str, present)))
def test_what_is_hashed_is_what_transformers_loads(bare: Path, weights, present) -> None:  # type: ignore[no-untyped-def]
    """Every form with weights of its own, beside files that nobody loads: which one it was shows."""
    for name in present:
        write_source(bare, name, weights, 2.0 + SOURCES.index(name))
    write_source(bare, "model.fp16.safetensors", weights, 8.0)
    write_source(bare, "stranger.safetensors", weights, 9.0)
    (bare / "training_args.bin").write_bytes(b"not read")
    loaded = SOURCES[int(loaded_marker(bare)) - 2]
    ours = weight_files(bare)
    assert ours[0] == loaded
    index = bare / loaded
    named = set(json.loads(index.read_text())["weight_map"].values()) if loaded.endswith(".json") else set()
    assert ours == [loaded, *sorted(named)]
    before = model_hashes(bare, LANGUAGE_FILES)
    assert set(ours) < set(before)
    for file in sorted(bare.glob("*")):
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        changed = model_hashes(bare, LANGUAGE_FILES) if file != index or not named else None
        if changed is not None:
            assert (changed != before) == (file.name in before), file.name
        file.write_bytes(content)


def test_a_shard_that_is_lost_is_named(bare: Path, weights) -> None:  # type: ignore[no-untyped-def]
    write_source(bare, "model.safetensors.index.json", weights, 2.0)
    (bare / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-00002-of-00002\.safetensors, which is not there"):
        model_hashes(bare, ())


def test_weights_named_by_the_configuration(bare: Path, weights) -> None:  # type: ignore[no-untyped-def]
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))
    write_source(bare, "model.safetensors", weights, 2.0)
    write_source(bare, "own.safetensors", weights, 3.0)
    assert loaded_marker(bare) == 3.0
    assert weight_files(bare) == ["own.safetensors"]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model.fp16.safetensors", "model.fp16.safetensors is not loaded under this name"),
        ("consolidated.safetensors", "not loaded under this name"),
        ("llama.gguf", "holds GGUF"),
        ("README.md", "no config.json with weights"),
    ],
)
def test_weights_that_are_not_loaded_are_none(bare: Path, file: str, said: str) -> None:
    (bare / file).write_bytes(b"x")
    with pytest.raises(UserError, match=said):
        model_hashes(bare, ())


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_config.json", "{}", "PEFT adapter .*merge it into the model"),
        ("shard-00000-model-00001-of-00002.safetensors", "", "distributed checkpoint"),
        (
            "config.json",
            '{"configuration_files": ["config.5.0.0.json"]}',
            "configuration_files",
        ),
        ("config.json", "{", "not valid JSON"),
    ],
)
def test_what_machines_load_differently_is_refused(
    clip_dir: Path, llama_dir: Path, tmp_path: Path, file: str, content: str, said: str
) -> None:
    for source in (clip_dir, llama_dir):
        out = shutil.copytree(source, tmp_path / source.name)
        (out / file).write_text(content)
        with pytest.raises(UserError, match=said):
            model_hashes(out, ())
    with pytest.raises(UserError, match=said):
        Transformers(path=tmp_path / clip_dir.name).identity()


def test_an_adapter_stops_every_command_that_would_load_it(extracted: Path, tmp_path: Path) -> None:
    root = extracted.parent
    text = extracted.read_text()
    llama = re.search(r'\[language\]\npath = "(.*)"', text)
    clip = re.search(r'name = "transformers", path = "([^"]*)"', text)
    assert llama
    assert clip
    for found, option, command in (
        (llama, "language.path", "federate"),
        (clip, "extract.encoder.path", "extract"),
    ):
        adapted = shutil.copytree(found[1], tmp_path / command)
        (adapted / "adapter_config.json").write_text("{}")
        changed = ["--set", f"{option}={adapted}", "--set", f"features={root}/features"]
        result = CliRunner().invoke(main, [command, str(extracted), *changed, "--set", "run=adapted"])
        assert result.exit_code == 2, result.output
        assert "merge it into the model" in result.output
        assert result.output.count("\n") == 1


def test_custom_code_is_refused_without_a_question(
    bare: Path, clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked on stdin")

    monkeypatch.setattr("builtins.input", asked)
    code = {
        "model_type": "nobody_knows",
        "auto_map": {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.Own",
            "AutoModel": "own.Own",
        },
    }
    for folder in (bare, shutil.copytree(clip_dir, tmp_path / "tower")):
        (folder / "config.json").write_text(json.dumps(code))
        (folder / "own.py").write_text("raise SystemExit('was run')\n")
    with pytest.raises(UserError, match="needs code of its own"):
        FrozenLanguageModel(bare, dtype="float32", device="cpu")
    with pytest.raises(UserError, match="needs code of its own"):
        Transformers(path=tmp_path / "tower").load("cpu", "float32")


def test_every_auto_class_is_told_to_run_no_code() -> None:
    calls = 0
    for file in chain.from_iterable(
        (ROOT / part).rglob("*.py") for part in ("pipeline", "extract", "federate", "evaluate")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_auto = isinstance(node.func.value, ast.Name) and node.func.value.id.startswith("Auto")
            if of_auto and node.func.attr in ("from_pretrained", "from_config"):
                calls += 1
                told = {word.arg: word.value for word in node.keywords}.get("trust_remote_code")
                assert isinstance(told, ast.Constant), f"{file}:{node.lineno}"
                assert told.value is False, f"{file}:{node.lineno}"
    assert calls > 5


def test_every_file_of_every_tokenizer_is_known() -> None:
    """Read from the sources of the transformers that is installed."""
    names = set()
    for source in Path(transformers.__file__).parent.rglob("tokenization*.py"):
        for table in re.findall(r"VOCAB_FILES_NAMES[^=]*= \{(.*?)\}", source.read_text(), re.S):
            names |= set(re.findall(r':\s*"([^"]+)"', table))
    assert {"vocab.json", "merges.txt", "spiece.model"} <= names
    assert not [name for name in sorted(names) if not any(fnmatch(name, known) for known in TOKENIZER_FILES)]


def test_no_file_is_opened_that_is_not_in_the_identity(llama_dir: Path, tmp_path: Path) -> None:
    """Of files opened by Python; weights and tokenizer.json are opened in Rust and tested above."""
    folder = shutil.copytree(llama_dir, tmp_path / "llm")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "added_tokens.json").write_text("{}")
    (folder / "README.md").write_text("x")
    code = f"""
import sys
from pathlib import Path
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.pretrained import read_weights
folder, seen = Path({str(folder)!r}), set()
def hook(event, arguments):
    if event == "open" and str(arguments[0]).startswith(str(folder)):
        seen.add(str(Path(arguments[0]).relative_to(folder)))
sys.addaudithook(hook)
FrozenLanguageModel(folder, dtype="float32", device="cpu")
print("opened", *sorted(seen), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    opened = set(done.stdout.split("opened\n")[1].split())
    assert {"config.json", "tokenizer_config.json", "additional_chat_templates/short.jinja"} <= opened
    hashed = set(model_hashes(folder, LANGUAGE_FILES))
    assert opened <= hashed
    assert "README.md" not in hashed


def test_open_clip_hashes_the_file_that_it_loads(tmp_path: Path) -> None:
    """The tower tells which of several files it came from."""
    import open_clip

    config = {"embed_dim": 8, "vision_cfg": {"image_size": 16, "layers": 2, "width": 64, "patch_size": 8}}
    config["text_cfg"] = {"context_length": 8, "vocab_size": 32, "width": 8, "heads": 1, "layers": 1}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "made")
    state = open_clip.create_model("tiny").state_dict()
    forms = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "other.safetensors")
    key = "visual.ln_pre.weight"
    for number, name in enumerate(forms):
        own = state | {key: torch.full_like(state[key], 2.0 + number)}
        if name.endswith(".bin"):
            torch.save(own, tmp_path / name)
        else:
            save_file(own, tmp_path / name)
    encoder = OpenClip(model=f"local-dir:{tmp_path}", layer=-1)
    while list(tmp_path.glob("*.safetensors")):
        (hashed,) = encoder.identity()["files"]
        loaded = encoder.load("cpu", "float32")
        marker = loaded._visual.ln_pre.weight  # type: ignore[attr-defined]
        assert forms[int(marker[0]) - 2] == hashed
        (tmp_path / hashed).unlink()


def test_a_projector_to_start_from_is_the_one_of_the_model(tmp_path: Path) -> None:
    """A stranger's file beside a whole model, or beside LLaVA's projector, is not looked at."""
    ours = {"multi_modal_projector.linear_1.weight": torch.full((4, 3), 2.0)}
    theirs = {"multi_modal_projector.linear_1.weight": torch.full((4, 3), 9.0)}
    (tmp_path / "config.json").write_text("{}")
    save_file(theirs, tmp_path / "another.safetensors")
    torch.save({"model.mm_projector.0.weight": torch.full((4, 3), 3.0)}, tmp_path / "mm_projector.bin")
    assert read_weights(tmp_path)[1]["linear_1.weight"].unique().tolist() == [3.0]
    save_file(ours, tmp_path / "model.safetensors")
    assert read_weights(tmp_path)[1]["linear_1.weight"].unique().tolist() == [2.0]
