"""Tokenizers, chat templates and files that do not fit a causal LM: one line each, or no harm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.gguf import refuse_gguf
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import _chat, end_of_turn, tokenise
from fedcmp.pipeline.records import Turn, caption
from fedcmp.pipeline.world import models

CPU = "cpu"
TEXTS = (caption("a small red circle"), caption("in the dark there is a zebra"), caption("sketch"))


def copied(llama_dir: Path, folder: Path, *without: str) -> Path:
    shutil.copytree(llama_dir, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*without))
    return folder


def test_a_padding_token_needs_no_row(llama_dir: Path, tmp_path: Path) -> None:
    plain = FrozenLanguageModel(llama_dir, dtype="float32", device=CPU)
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copied(llama_dir, tmp_path))
    language = FrozenLanguageModel(tmp_path, dtype="float32", device=CPU)
    assert language.tokenizer.pad_token_id == language.rows > language.pad_id
    samples = [tokenise(text, "plain", plain.tokenizer, patches=2, max_length=99) for text in TEXTS]
    projected = torch.ones(3, 2, 32)
    ours, theirs = (each.token_losses(*each.collate(samples), projected)[0] for each in (language, plain))
    assert torch.equal(ours, theirs)


def test_a_word_without_a_row_is_named(llama_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.add_tokens(["small red"])
    tokenizer.save_pretrained(copied(llama_dir, tmp_path))
    language = FrozenLanguageModel(tmp_path, dtype="float32", device=CPU)
    tokens = tokenise(caption("a small red circle"), "plain", language.tokenizer, patches=2, max_length=99)
    with pytest.raises(
        UserError, match=rf"token {language.rows} \('small red'\).* have {language.rows} rows"
    ):
        language.collate([tokens])
    with pytest.raises(UserError, match=rf"token {language.rows} \('small red'\)"):
        language.generate([tokens], torch.ones(1, 2, 32), [0], max_new_tokens=2, stop=None)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_no_tokenizer_is_not_an_empty_one(kind: str, tmp_path: Path) -> None:
    from architectures import save

    save(kind, tmp_path, models.tokenizer())
    for file in (*tmp_path.glob("token*"), *tmp_path.glob("*.jinja")):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer in it; copy"):
        FrozenLanguageModel(tmp_path, dtype="float32", device=CPU)


def test_a_broken_tokenizer_is_not_called_absent(llama_dir: Path, tmp_path: Path) -> None:
    (copied(llama_dir, tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        FrozenLanguageModel(tmp_path, dtype="float32", device=CPU)


def test_a_slow_tokenizer_is_refused(llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SimpleNamespace(is_fast=False, get_vocab=lambda: {"a": 0}, all_special_tokens=[])
    monkeypatch.setattr(
        "fedcmp.pipeline.models.loading.AutoTokenizer.from_pretrained", lambda *_, **__: tokenizer
    )
    with pytest.raises(UserError, match=r"not a fast tokenizer.*add a tokenizer\.json"):
        FrozenLanguageModel(llama_dir, dtype="float32", device=CPU)


def test_gguf_is_named(llama_dir: Path, tmp_path: Path) -> None:
    folder = copied(llama_dir, tmp_path / "m", "*.safetensors")
    (folder / "llama.Q4_K_M.gguf").write_bytes(b"GGUF")
    for path in (folder, folder / "llama.Q4_K_M.gguf"):
        with pytest.raises(UserError, match=r"llama.Q4_K_M.gguf is a GGUF file.*fedcmp convert"):
            refuse_gguf(path)
        with pytest.raises(UserError, match="is a GGUF file"):
            FrozenLanguageModel(path, dtype="float32", device=CPU)
    copied(llama_dir, folder)
    refuse_gguf(folder)


_ROLES = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
_BEGUN = _ROLES + "{% if add_generation_prompt %}### assistant:\n{% endif %}"


def test_a_template_that_begins_no_reply_trains_no_header(llama_dir: Path) -> None:
    """And asks as it trains: the prompt is what stands before the answer."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    turns = (Turn("user", "<image>\nwhere?"), Turn("assistant", "left"), Turn("user", "so?"))
    tokenizer.chat_template = _BEGUN
    usual = _chat(turns, tokenizer)
    assert usual[0][1] == ("left\n", True)
    tokenizer.chat_template = _ROLES
    assert _chat(turns, tokenizer) == usual
    assert _chat(turns[:1], tokenizer)[0] == usual[0][:1]
    tokenizer.chat_template = "{% for m in messages %} {{ m.role }}: {{ m.content }}{% endfor %}"
    # The space belongs to the word, or a prompt would end in a token that training never saw.
    assert _chat(turns, tokenizer)[0][:2] == [(" user: <image>\nwhere? assistant:", False), (" left", True)]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (None, "has no chat template; use 'v1'"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "the chat template refuses it: roles must alternate",
        ),
        ("{{ messages[0].content }}", "does not write answers; use 'v1'"),
    ],
)
def test_a_chat_template_of_no_use_is_one_line(llama_dir: Path, template: str | None, why: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=why):
        _chat((Turn("user", "<image>\nwhere?"), Turn("assistant", "left")), tokenizer)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_answer_ends_where_the_template_ends_it(llama_dir: Path, tmp_path: Path) -> None:
    """Many a fine-tuned model's generation_config knows the base model's end of text alone."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    eos = tokenizer.eos_token_id
    tokenizer.chat_template = CHATML
    assert end_of_turn(tokenizer) == set()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert end_of_turn(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "{{ eos_token }}")
    assert end_of_turn(tokenizer) == {eos}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn(tokenizer) == set()
    tokenizer.chat_template = CHATML
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    language = FrozenLanguageModel(tmp_path, dtype="float32", device="cpu")
    assert end in language._ends
    assert eos in language._ends


def test_no_text_is_longer_than_the_positions_that_an_llm_has(llama_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(llama_dir, tmp_path / "short")
    path = tmp_path / "short/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 40}))
    language = FrozenLanguageModel(tmp_path / "short", dtype="float32", device="cpu")
    assert (language.at_most(2048), language.at_most(30)) == (40, 30)
