"""By-hand splice from features = Hugging Face's LLaVA on pixels, on tiny random models."""

from __future__ import annotations

import io
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from transformers import AutoTokenizer

from fedcmp.extract.encoders.transformers import Transformers
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel, load_language
from fedcmp.pipeline.models.prompts import (
    CAPTION_PROMPT,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    V1_SYSTEM,
    Tokens,
    _chat,
    _v1,
    question,
    tokenise,
)
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.records import Text, Turn, caption

CPU = "cpu"


@pytest.fixture(scope="module")
def language(llama_dir: Path) -> FrozenLanguageModel:
    return FrozenLanguageModel(llama_dir, dtype="float32", device=CPU)


@pytest.fixture(scope="module")
def llava(clip_dir: Path, llama_dir: Path):  # type: ignore[no-untyped-def]
    """The full model assembled from the same weights, and the projector's state."""
    from transformers import (
        AutoModelForCausalLM,
        CLIPVisionModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tower, llm = CLIPVisionModel.from_pretrained(clip_dir), AutoModelForCausalLM.from_pretrained(llama_dir)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=4,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    projector = projectors.build(Component(name="mlp2x_gelu"), d_vision=24, d_llm=32)
    projectors.initialise(projector, torch.Generator().manual_seed(3))
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    return model, projector


@pytest.fixture(scope="module")
def pixels(clip_dir: Path) -> torch.Tensor:
    encoder = Transformers(path=clip_dir).load(CPU, "float32")
    images = [Image.open(io.BytesIO(picture(seed))) for seed in range(3)]
    return torch.from_numpy(np.stack([encoder.preprocess(image) for image in images]))


TEXTS = (caption("a small red circle"), caption("in the dark there is a zebra"), caption("sketch"))


def test_logits_loss_and_gradient_equal_llava(language, llava, clip_dir, pixels) -> None:  # type: ignore[no-untyped-def]
    model, projector = llava
    features = Transformers(path=clip_dir).load(CPU, "float32").encode(pixels)
    samples = [tokenise(text, "plain", language.tokenizer, patches=16, max_length=99) for text in TEXTS]
    ids, labels = language.collate(samples)
    hidden = language.decoder(inputs_embeds=language.embed(ids, projector(features))).last_hidden_state
    ours = language.head(hidden)
    theirs = model(input_ids=ids.where(ids >= 0, 4), pixel_values=pixels, labels=labels)
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=1e-5)

    losses, rows = language.token_losses(ids, labels, projector(features))
    assert len(losses) == sum(sample.supervised for sample in samples)
    assert torch.bincount(rows).tolist() == [sample.supervised for sample in samples]
    torch.testing.assert_close(losses.mean(), theirs.loss, rtol=0, atol=1e-5)
    losses.mean().backward()
    theirs.loss.backward()
    for name, parameter in projector.named_parameters():
        reference = model.model.multi_modal_projector.get_parameter(name)
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in language.model.parameters())


def test_greedy_answers_equal_llava(language, llava, clip_dir, pixels) -> None:  # type: ignore[no-untyped-def]
    model, projector = llava
    features = Transformers(path=clip_dir).load(CPU, "float32").encode(pixels)
    questions = ["what color is the star?", "how many?", "is there a blue cross in the image?"]
    samples = [
        tokenise(question(text), "chat", language.tokenizer, patches=16, max_length=99) for text in questions
    ]
    with torch.no_grad():
        ours = language.generate(samples, projector(features), range(3), max_new_tokens=12, stop=None)
    for row, sample in enumerate(samples):
        alone = torch.tensor([sample.ids])
        output = model.generate(
            input_ids=alone.where(alone >= 0, 4),
            attention_mask=torch.ones_like(alone),
            pixel_values=pixels[row : row + 1],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=language.tokenizer.eos_token_id,
            pad_token_id=0,
        )
        theirs = language.tokenizer.decode(output[0, len(sample.ids) :], skip_special_tokens=True)
        assert ours[row] == theirs.strip()
        assert ours[row]


def test_greedy_is_greedy_and_every_end_token_ends(llama_dir: Path, tmp_path: Path) -> None:
    """Penalties and end tokens that a model ships with: the first are ignored, the second heeded."""
    shutil.copytree(llama_dir, tmp_path / "m")
    plain = FrozenLanguageModel(tmp_path / "m", dtype="float32", device=CPU)
    samples = [tokenise(question("what color?"), "chat", plain.tokenizer, patches=2, max_length=99)]
    projected = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0))

    def said(language: FrozenLanguageModel) -> list[str]:
        answer = language.generate(samples, projected, [0], max_new_tokens=8, stop=None)
        return answer[0].split()

    words = said(plain)
    config = json.loads((tmp_path / "m/generation_config.json").read_text())
    config |= {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0}
    (tmp_path / "m/generation_config.json").write_text(json.dumps(config))
    assert said(FrozenLanguageModel(tmp_path / "m", dtype="float32", device=CPU)) == words
    second = plain.tokenizer.get_vocab()[words[1]]
    config["eos_token_id"] = [plain.tokenizer.eos_token_id, second]
    (tmp_path / "m/generation_config.json").write_text(json.dumps(config))
    ended = said(FrozenLanguageModel(tmp_path / "m", dtype="float32", device=CPU))
    assert ended == words[: words.index(words[1]) + 1]


def test_padding_changes_no_loss(language: FrozenLanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    projected = torch.randn(3, 4, 32, generator=generator)
    samples = [tokenise(text, "plain", language.tokenizer, patches=4, max_length=99) for text in TEXTS]
    together, rows = language.token_losses(*language.collate(samples), projected)
    for row, sample in enumerate(samples):
        alone, _ = language.token_losses(*language.collate([sample]), projected[row : row + 1])
        torch.testing.assert_close(together[rows == row], alone, rtol=0, atol=1e-5)


def test_every_row_needs_its_visual_tokens(language: FrozenLanguageModel) -> None:
    ids = torch.tensor([[IMAGE_TOKEN_INDEX] * 3 + [5], [IMAGE_TOKEN_INDEX, 5, 5, 5]])
    with pytest.raises(ValueError, match="exactly 2 visual tokens"):
        language.embed(ids, torch.zeros(2, 2, 32))


def test_plain_is_llavas_stage_one(language: FrozenLanguageModel) -> None:
    tokenizer = language.tokenizer
    text = Text((Turn("user", "Describe.\n<image>"), Turn("assistant", "a red ring")))
    tokens = tokenise(text, "plain", tokenizer, patches=3, max_length=99)
    words = tokenizer("a red ring\n", add_special_tokens=False)["input_ids"]
    assert tokens.ids == [tokenizer.bos_token_id, *[IMAGE_TOKEN_INDEX] * 3, *words]
    assert tokens.labels == [IGNORE_INDEX] * 4 + words
    assert tokens == tokenise(caption("a red ring"), "plain", tokenizer, patches=3, max_length=99)


@pytest.mark.parametrize("template", ["chat", "v1"])
def test_only_answers_are_supervised(language: FrozenLanguageModel, template: str) -> None:
    tokenizer = language.tokenizer
    turns = (
        Turn("user", "is there a star?\n<image>"),
        Turn("assistant", "yes"),
        Turn("user", "where?"),
        Turn("assistant", "top left"),
    )
    tokens = tokenise(Text(turns), template, tokenizer, patches=2, max_length=999)
    eos = tokenizer.eos_token_id
    predicted = [label for label in tokens.labels if label != IGNORE_INDEX]
    words = tokenizer("yes top left", add_special_tokens=False)["input_ids"]
    assert predicted == [words[0], eos, *words[1:], eos]
    assert tokens.ids.count(IMAGE_TOKEN_INDEX) == 2
    whole = tokens.ids[: tokens.ids.index(IMAGE_TOKEN_INDEX)]
    assert whole[0] == tokenizer.bos_token_id
    prompt = tokenise(Text(turns[:1]), template, tokenizer, patches=2, max_length=999)
    assert tokens.ids[: len(prompt.ids)] == prompt.ids
    assert prompt.supervised == 0


def test_v1_is_vicunas() -> None:
    """As `SeparatorStyle.TWO` of LLaVA's conversation.py joins turns."""
    turns = (Turn("user", "<image>\na?"), Turn("assistant", "b"), Turn("user", "c?"), Turn("assistant", "d"))
    spans, begin = _v1(turns, SimpleNamespace(eos_token="</s>"))  # type: ignore[arg-type]
    assert begin
    assert "".join(content for content, _ in spans) == (
        f"{V1_SYSTEM} USER: <image>\na? ASSISTANT: b</s>USER: c? ASSISTANT: d</s>"
    )


def test_qwen3_is_not_asked_to_think(llama_dir: Path) -> None:
    """Its template, cut down: a turn that is begun thinks unless told not to, the last one has thought."""
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
    )
    turns = (Turn("user", "<image>\nwhere?"), Turn("assistant", "left"))
    spans, _ = _chat(turns, tokenizer)
    assert spans == [("[user]<image>\nwhere?[assistant]<think></think>", False), ("left", True)]


def test_a_tokenizer_of_sentencepiece_alone(llama_dir: Path, tmp_path: Path) -> None:
    """Vicuna's repository has no tokenizer.json."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small red circle is in the picture"] * 20),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    shutil.copytree(
        llama_dir, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("token*", "*.jinja")
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    words = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    tokenizer = FrozenLanguageModel(tmp_path, dtype="float32", device=CPU).tokenizer
    tokens = tokenise(caption("a red zoo"), "plain", tokenizer, patches=2, max_length=99)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert tokens.ids == [theirs.bos_id(), *[IMAGE_TOKEN_INDEX] * 2, *theirs.encode("a red zoo\n")]


def test_a_bare_caption_gets_a_prompt_in_a_chat(language: FrozenLanguageModel) -> None:
    for template in ("chat", "v1"):
        tokens = tokenise(caption("a star"), template, language.tokenizer, patches=2, max_length=999)
        asked = tokenise(question(CAPTION_PROMPT), template, language.tokenizer, patches=2, max_length=999)
        assert tokens.ids[: len(asked.ids)] == asked.ids


def test_what_has_no_form_is_an_error(language: FrozenLanguageModel) -> None:
    two = Text((Turn("user", "<image> <image>"), Turn("assistant", "x")))
    with pytest.raises(ValueError, match="refers to 2 images"):
        tokenise(two, "chat", language.tokenizer, patches=2, max_length=99)
    several = Text((Turn("user", "a"), Turn("assistant", "x"), Turn("user", "b"), Turn("assistant", "y")))
    with pytest.raises(ValueError, match=r"2 answers.*language.template"):
        tokenise(several, "plain", language.tokenizer, patches=2, max_length=99)


def test_long_texts_are_cut(language: FrozenLanguageModel) -> None:
    tokens = tokenise(caption("star " * 50), "plain", language.tokenizer, patches=3, max_length=20)
    assert len(tokens.ids) == len(tokens.labels) == 20
    assert tokens.supervised == 16
    for max_length in (2, 4):
        with pytest.raises(ValueError, match=rf"max_length = {max_length} leaves no room"):
            tokenise(caption("star"), "plain", language.tokenizer, patches=3, max_length=max_length)


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu"])
def test_projectors_round_trip(tmp_path: Path, name: str) -> None:
    projector = projectors.build(Component(name=name), d_vision=6, d_llm=10)
    projectors.initialise(projector, torch.Generator().manual_seed(0))
    state = projectors.state_of(projector)
    projectors.save_projector(tmp_path / "p.safetensors", state, name)
    loaded, again = projectors.load_projector(tmp_path / "p.safetensors")
    assert projectors.content_hash(again) == projectors.content_hash(state)
    features = torch.randn(2, 3, 6)
    torch.testing.assert_close(loaded(features), projector(features), rtol=0, atol=0)
    (tmp_path / "p.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="not a safetensors file"):
        projectors.load_projector(tmp_path / "p.safetensors")


@pytest.fixture(scope="module")
def wider_llama(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for the blocks in which bitsandbytes quantises."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    out = tmp_path_factory.mktemp("wide")
    shutil.copytree(llama_dir, out, dirs_exist_ok=True)
    config = LlamaConfig.from_pretrained(llama_dir)
    config.update({"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def losses_and_gradient(language: FrozenLanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[1, *[IMAGE_TOKEN_INDEX] * 5, 9, 8, 7, 6], [1, *[IMAGE_TOKEN_INDEX] * 5, 5, 9, 2, 2]])
    labels = ids.clone()
    labels[:, :6] = IGNORE_INDEX
    generator = torch.Generator().manual_seed(6)
    projected = torch.randn(2, 5, language.d_llm, generator=generator).requires_grad_()
    losses, _ = language.token_losses(ids, labels, projected)
    losses.sum().backward()
    assert projected.grad is not None
    return losses.detach(), projected.grad


def off_by(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_checkpointing_changes_no_bit_and_keeps_less(llama_dir: Path) -> None:
    """Also in generation, which comes after training in one process."""
    kept = {}
    results = {}
    for checkpointing in (False, True):
        model = FrozenLanguageModel(llama_dir, dtype="float32", device=CPU)
        model.checkpointing = checkpointing
        sizes: list[int] = []
        pack = lambda t, sizes=sizes: sizes.append(t.nbytes) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results[checkpointing] = losses_and_gradient(model)
        kept[checkpointing] = sum(sizes)
        prompt = Tokens([1, IMAGE_TOKEN_INDEX, 9, 8], [])
        words = model.generate([prompt], torch.ones(1, 1, 32), [0], max_new_tokens=5, stop=None)
        results[checkpointing] += (words,)
    assert kept[True] < kept[False] / 2
    assert torch.equal(results[True][0], results[False][0])
    assert torch.equal(results[True][1], results[False][1])
    assert results[True][2] == results[False][2]


@pytest.mark.filterwarnings("default")  # torch.compile looks at what warns
def test_compiled_training_is_equal_up_to_rounding(llama_dir: Path) -> None:
    plain = losses_and_gradient(FrozenLanguageModel(llama_dir, dtype="float32", device=CPU))
    language = FrozenLanguageModel(llama_dir, dtype="float32", device=CPU)
    language.compiled = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for ours, theirs in zip(losses_and_gradient(language), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs < len(language.layers) + 1  # layers share their code
    tokens = tokenise(question("a red ring?"), "chat", language.tokenizer, patches=2, max_length=99)
    language.generate([tokens], torch.ones(1, 2, 32), [0], max_new_tokens=2, stop=None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("quantize", "most"), [("8bit", 0.03), ("4bit", 0.25)])
def test_quantised_llms_train_the_projector(wider_llama: Path, quantize: str, most: float) -> None:
    plain = FrozenLanguageModel(wider_llama, dtype="float32", device=CPU)
    ours = FrozenLanguageModel(wider_llama, dtype="float32", device=CPU, quantize=quantize)
    assert any(parameter.dtype in (torch.int8, torch.uint8) for parameter in ours.model.parameters())
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())
    for quantised, exact in zip(losses_and_gradient(ours), losses_and_gradient(plain), strict=True):
        assert 0 < off_by(quantised, exact) < most


def test_device_map_changes_nothing_where_there_is_one_device(llama_dir: Path) -> None:
    plain = losses_and_gradient(FrozenLanguageModel(llama_dir, dtype="float32", device=CPU))
    spread = FrozenLanguageModel(llama_dir, dtype="float32", device=CPU, device_map="auto")
    for ours, theirs in zip(losses_and_gradient(spread), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_are_missing_are_not_random(llama_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaModel

    shutil.copytree(llama_dir, tmp_path, dirs_exist_ok=True)
    LlamaModel.from_pretrained(llama_dir).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lm_head.weight is missing from its weights and would be random"):
        FrozenLanguageModel(tmp_path, dtype="float32", device=CPU)


def test_one_llm_is_kept_for_training_and_evaluation(llama_dir: Path) -> None:
    options = {"content": "a", "dtype": "float32", "device": CPU}
    first = load_language(llama_dir, **options)
    assert load_language(llama_dir, **options) is first
    gone = weakref.ref(first)
    del first
    load_language(llama_dir, **options | {"content": "b"})
    assert gone() is None


@pytest.mark.parametrize(("key", "value"), [("quantize", "4bit"), ("device_map", "auto")])
def test_a_missing_package_is_named(
    llama_dir: Path, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcmp.pipeline.models.loading.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"language\.{key} = '{value}'.*fedcmp\[large\]"):
        FrozenLanguageModel(llama_dir, dtype="float32", device=CPU, **{key: value})
