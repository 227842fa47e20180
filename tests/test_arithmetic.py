"""Loss, gradient and answers are those of the whole model, or it is refused by name: every architecture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from language_table import known, load, table, version, written
from transformers import AutoModelForCausalLM, MistralConfig

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.language import FrozenLanguageModel, load_language
from fedcmp.pipeline.models.prompts import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Tokens
from fedcmp.pipeline.models.proof import Ways
from fedcmp.pipeline.world import models

# Optional kernels of state-space models are missed aloud.
pytestmark = pytest.mark.filterwarnings("ignore")

IMAGES = torch.tensor([[11, 22, 33], [44, 55, 12]])
QUESTIONS = ([6, 7, 8], [9, 10, 13, 14, 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 26], [27])
OWNERS = [1, 0, 1]
ANSWERS = ([30, 31, 32, 34], [35], [36, 37])

_FOUND: dict[str, FrozenLanguageModel | str] = {}


def found(name: str, root: Path) -> FrozenLanguageModel | str:
    if name not in _FOUND:
        _FOUND[name] = load(name, root / name, models.tokenizer())
    return _FOUND[name]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_gradient_and_answers_are_the_whole_models(name: str, root: Path) -> None:
    """Visual tokens are the embeddings of words here, so the whole model can be asked in words alone."""
    if name not in known():
        pytest.skip(f"transformers {version()} has no {name}")
    language = found(name, root)
    if isinstance(language, str):
        assert language.startswith("language.path = ")
        assert f"{name.split(',')[0]} " in language
        assert "\n" not in language
        return
    begin = [5, *[IMAGE_TOKEN_INDEX] * 3]
    samples, spoken = [], []
    for question, answer, owner in zip(QUESTIONS, ANSWERS, OWNERS, strict=True):
        labels = [IGNORE_INDEX] * (len(begin) + len(question)) + answer
        samples.append(Tokens([*begin, *question, *answer], labels))
        spoken.append([5, *IMAGES[owner].tolist(), *question])

    projected = language.words(IMAGES)[OWNERS].detach().requires_grad_()
    losses, rows = language.token_losses(*language.collate(samples), projected)
    losses.sum().backward()
    for row, (words, answer) in enumerate(zip(spoken, ANSWERS, strict=True)):
        ids = torch.tensor([words + answer])
        with torch.no_grad():
            said = language.model(input_ids=ids).logits[0, len(words) - 1 : -1].log_softmax(-1)
        wanted = -said[range(len(answer)), answer]
        torch.testing.assert_close(losses[rows == row].detach(), wanted, rtol=1e-4, atol=1e-4)
        embeds = language.words(ids).detach().requires_grad_()
        logits = language.model(inputs_embeds=embeds.clone(), use_cache=False).logits[0, len(words) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").backward()
        gradient, ours = embeds.grad[0, 1:4], projected.grad[row]
        assert gradient.norm() > 0
        assert (ours - gradient).norm() < 1e-3 * gradient.norm()

    prompts = [Tokens([*begin, *question], []) for question in QUESTIONS]
    visual = language.words(IMAGES)
    language._ends = set()
    together = language.generate(prompts, visual, OWNERS, max_new_tokens=6, stop=None)
    for row, words in enumerate(spoken):
        alone = language.generate([prompts[row]], visual, [OWNERS[row]], max_new_tokens=6, stop=None)
        ids = list(words)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(language.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        wanted = language.tokenizer.decode(ids[len(words) :], skip_special_tokens=True).strip()
        assert [together[row], *alone] == [wanted, wanted]


def test_the_table_in_the_docs_is_true(root: Path) -> None:
    """On another version of transformers the test above has to do."""
    _, inside, _ = written()
    assert inside.startswith("With transformers ")
    if not inside.startswith(f"With transformers {version()},"):
        pytest.skip(f"the table was made with another transformers than {version()}")
    ways: dict[str, Ways | str] = {}
    for name in known():
        each = found(name, root)
        ways[name] = each if isinstance(each, str) else each.ways
    assert len(ways) >= 40
    assert table(ways) == inside, "run: python tests/language_table.py --write"


def test_the_proof_leaves_no_trace(llama_dir: Path) -> None:
    """No random number is drawn, no gradient flows, no layer is left in another mode, no hook stays."""
    state = torch.get_rng_state()
    language = FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert language.ways == Ways()
    assert not language.ways.note
    assert not any(module.training for module in language.model.modules())
    assert not language.head._forward_hooks
    assert all(each.grad is None and not each.requires_grad for each in language.model.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("llama", Ways()),
        ("gemma2", Ways(whole=True, shared=False)),
        ("mpt", Ways(shared=False)),
        ("rwkv", Ways(padded=False, shared=False)),
    ],
)
def test_rounding_is_no_difference_and_a_difference_no_rounding(
    name: str, ways: Ways, dtype: str, tmp_path: Path
) -> None:
    load(name, tmp_path, models.tokenizer())
    assert FrozenLanguageModel(tmp_path, dtype=dtype, device="cpu").ways == ways


def test_another_way_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("rwkv", tmp_path, models.tokenizer())
    capsys.readouterr()
    for _ in range(2):
        load_language(tmp_path, "a", dtype="float32", device="cpu")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("language.path")]
    assert said == [
        f"language.path = {tmp_path}: prompts of unequal length are answered apart, because padding "
        "changes its answers"
    ]


def test_weights_that_give_no_numbers_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    model.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"its logits are not numbers in torch\.float32"):
        FrozenLanguageModel(tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize("window", [None, 16])
def test_windows_that_no_few_tokens_fill_are_read_from_the_configuration(
    window: int | None, tmp_path: Path
) -> None:
    tokenizer = models.tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    language = FrozenLanguageModel(tmp_path, dtype="float32", device="cpu")
    assert language.ways.shared == (window is None)


def test_whole_models_are_compiled_too(tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        language = load("granite", tmp_path, models.tokenizer())
        assert isinstance(language, FrozenLanguageModel)
        language.compiled = compiled
        ids = torch.tensor([[5, *[IMAGE_TOKEN_INDEX] * 3, 9, 8, 7]])
        labels = torch.tensor([[IGNORE_INDEX] * 5 + [8, 7]])
        projected = language.words(IMAGES[:1]).detach().requires_grad_()
        losses, _ = language.token_losses(ids, labels, projected)
        losses.sum().backward()
        results.append((losses.detach(), projected.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
