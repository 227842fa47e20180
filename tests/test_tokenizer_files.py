"""Words become the tokens that tokenizer.json says, whatever class transformers takes for a type of model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.loading import load_tokenizer

CORPUS = [
    "is there a dog in the picture 2023?",
    "un œil, x-ray L4/5 of 12.5 mm\n",
    "650841823 don't  <a>",
] * 4
TYPES = ("llama", "qwen2", "gemma3_text", "gpt2", "olmo2", "cohere", "mistral", "phi3", "deepseek_v3")


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen split words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return made


def metaspace() -> Tokenizer:
    """As SentencePiece, Llama 2 and Gemma split words."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator(CORPUS, trainer)
    return made


def words() -> Tokenizer:
    """As the embedded default splits words."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"])
    made.train_from_iterator(CORPUS, trainer)
    return made


def saved(folder: Path, made: Tokenizer, kind: str, declared: str | None) -> Path:
    config = AutoConfig.for_model(kind, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    if declared:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": declared}))
    return folder


@pytest.mark.parametrize("declared", [None, "LlamaTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("make", [byte_level, metaspace, words])
def test_words_become_the_tokens_of_the_file(
    make: object, kind: str, declared: str | None, tmp_path: Path
) -> None:
    path = saved(tmp_path, make(), kind, declared)  # type: ignore[operator]
    raw = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer = load_tokenizer(path)
    for text in CORPUS[:3]:
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert found == raw.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(found) == raw.decode(found)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("odd"), byte_level(), "qwen2", "LlamaTokenizerFast")


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40))
def test_so_does_any_text(odd: Path, text: str) -> None:
    raw = Tokenizer.from_file(str(odd / "tokenizer.json"))
    wanted = raw.encode(text, add_special_tokens=False).ids
    assert load_tokenizer(odd)(text, add_special_tokens=False)["input_ids"] == wanted


def test_a_tokenizer_of_another_kind_than_its_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, byte_level(), "llama", None)
    other = PreTrainedTokenizerFast(tokenizer_object=words(), bos_token="<s>", eos_token="</s>")
    for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):
        monkeypatch.setattr(f"fedcmp.pipeline.models.loading.{name}.from_pretrained", lambda *_, **__: other)
    with pytest.raises(UserError, match=r"splits words differently from tokenizer\.json"):
        load_tokenizer(path)
