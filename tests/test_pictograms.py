"""The study on real weights, from packages that have the layout of the public ones; and GGUF files."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import ROOT, digest
from PIL import Image

from fedcmp.cli import main
from fedcmp.extract.encoders.timm import Timm
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.gguf import convert
from fedcmp.pipeline.pictograms import write as study
from fedcmp.pipeline.pictograms.pinned import Pinned

gguf = pytest.importorskip("gguf")
pytest.importorskip("resvg_py")

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "Ġ", "ab", "Ġa"]
MERGES = ["a b", "Ġ a"]


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: Any, path: Path) -> Path:
    """A llama as llama.cpp's converter writes it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in model.state_dict().items():
        weight = value.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = weight.reshape(heads, 2, -1, weight.shape[1])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        short = name.removeprefix("model.").removesuffix(".weight")
        short = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(short, short)
        if short.startswith("layers."):
            _, number, part = short.split(".", 2)
            short = f"blk.{number}.{names[part]}"
        writer.add_tensor(f"{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_converted_gguf_computes_what_the_model_did(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = llama()
    file = write_gguf(model, tmp_path / "tiny.gguf")
    result = CliRunner().invoke(
        main, ["convert", str(file), "--out", str(tmp_path / "out"), "--dtype", "float32"]
    )
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[1, 3, 4, 5, 7]])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab a", add_special_tokens=False)["input_ids"] == [7, 8]
    assert not (tmp_path / "out.partial").exists()
    before = digest(tmp_path / "out")
    again = CliRunner().invoke(main, ["convert", str(file), "--out", str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "there is something already" in again.output
    assert digest(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"GGUF\0\0\0", "transformers cannot read it")]
)
def test_what_is_no_gguf_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def pinned(path: Path) -> Pinned:
    return Pinned(path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest(), "CC0-1.0")


def pictures(path: Path) -> Pinned:
    """OpenMoji's package with thirty coloured squares a group."""
    table = io.StringIO()
    writer = csv.DictWriter(table, ["hexcode", "group", "annotation", "skintone"])
    writer.writeheader()
    files = {}
    for number in range(30 * len(study.GROUPS)):
        code, group = f"{0x1F300 + number:X}", list(study.GROUPS)[number % len(study.GROUPS)]
        row = {"hexcode": code, "group": group, "annotation": f"thing {number}"}
        writer.writerow(row)
        writer.writerow(
            row | {"hexcode": code + "-1F3FB", "annotation": f"pale thing {number}", "skintone": "1"}
        )
        colour = f"#{number * 1000 % 0xFFFFFF:06x}"
        files[f"package/color/svg/{code}.svg"] = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="36" height="72" '
            f'fill="{colour}"/></svg>'
        )
        if number < 6:  # the same drawing under another name
            writer.writerow(row | {"hexcode": code + "-2", "annotation": f"also thing {number}"})
            files[f"package/color/svg/{code}-2.svg"] = files[f"package/color/svg/{code}.svg"]
    writer.writerow({"hexcode": "1F1E9", "group": "flags", "annotation": "a flag"})
    files["package/data/openmoji.csv"] = table.getvalue()
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return pinned(path)


def wheel(path: Path, name: str, data: bytes) -> Pinned:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "")
        archive.writestr(name, data)
    return pinned(path)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pinned]:
    root = tmp_path_factory.mktemp("packages")
    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    buffer = io.BytesIO()
    torch.save({f"_layer{n}": value for n, value in enumerate(state.values())}, buffer)
    return {
        "PICTURES": pictures(root / "openmoji.tgz"),
        "ENCODER": wheel(root / "encoder.whl", "package/models/lite0.pth", buffer.getvalue()),
        "LANGUAGE": wheel(
            root / "language.whl", "package/tiny.gguf", write_gguf(llama(), root / "t.gguf").read_bytes()
        ),
    }


@pytest.fixture
def here(packages: dict[str, Pinned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, package in packages.items():
        monkeypatch.setattr(study, name, package)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_study_is_written_from_its_packages(here: Path) -> None:
    result = CliRunner().invoke(main, ["world", "pictograms", "out"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    out = here / "out"
    silos = {path.stem: json.loads(path.read_text()) for path in (out / "silos").iterdir()}
    held = json.loads((out / "heldout.json").read_text()) + json.loads((out / "validation.json").read_text())
    assert silos.keys() == study.SILOS.keys()
    seen = {entry["image"] for entries in silos.values() for entry in entries}
    assert len(seen) == 6 * 21
    assert not seen & {entry["image"] for entry in held}
    assert len(held) == 6 * 9
    for entries in silos.values():
        asked = [[turn["value"] for turn in entry["conversations"]] for entry in entries[1::2]]
        assert {question for question, _ in asked} == {"<image>\n" + study.QUESTION}
        answers = Counter(answer for _, answer in asked)
        assert answers.keys() == {"Yes", "No"}
        assert min(answers.values()) >= 10
        assert len(entries) // 2 in (20, 21, 22)
    assert np.array(Image.open(out / "images" / min(seen)).convert("RGB"))[5, 100].tolist() == [255] * 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert [source["licence"] for source in manifest["sources"]] == ["CC0-1.0"] * 3
    rows = [json.loads(line) for line in (out / "benchmarks/living.jsonl").read_text().splitlines()]
    assert Counter(row["answer"] for row in rows) == {"Yes": 18, "No": 18}
    assert all(study.GROUPS[row["group"]] == (row["answer"] == "Yes") for row in rows)
    again = {path: path.read_bytes() for path in out.rglob("*.json") if "manifest" not in path.name}
    assert CliRunner().invoke(main, ["world", "pictograms", "out"]).exit_code == 0
    assert again == {path: path.read_bytes() for path in again}

    encoder = Timm(
        model="local-dir:out/models/encoder", layer=-1, preprocessing={"input_size": [3, 128, 128]}
    )
    loaded = encoder.load("cpu", "float32")
    assert (loaded.patches, loaded.d_vision) == (16, 320)
    (here / "build").mkdir()
    out.rename(here / "build/pictograms")
    config = str(ROOT / "configs/pictograms.toml")
    result = CliRunner().invoke(main, ["extract", config, "--silo", "site2"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "21 │    42 │       0" in result.output


def test_another_file_than_the_pinned_one_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "PICTURES", replace(study.PICTURES, sha256="0" * 64))
    result = CliRunner().invoke(main, ["world", "pictograms", "out"])
    assert result.exit_code == 2
    assert "instead of " + "0" * 64 in result.output
    monkeypatch.setattr(study, "PICTURES", replace(study.PICTURES, url="file:///nowhere/openmoji.tgz"))
    result = CliRunner().invoke(main, ["world", "pictograms", "out"])
    assert result.exit_code == 2
    assert "cannot be downloaded" in result.output
    assert "put it at out/downloads/openmoji.tgz" in result.output
    assert not (here / "out/manifest.json").exists()
