"""A projector in front of the frozen LLM, trained through the LLM or from its visual tokens back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import question, tokenise_all
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.records import Text, Turn

PATCHES, D_VISION = 3, 8


@pytest.fixture
def model(llama_dir: Path) -> VisionLanguage:
    language = FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")
    projector = projectors.build(Component(name="mlp2x_gelu"), d_vision=D_VISION, d_llm=language.d_llm)
    projectors.initialise(projector, torch.Generator().manual_seed(0))
    return VisionLanguage(projector, language)


def test_only_the_projector_is_trained(model: VisionLanguage) -> None:
    assert model.trainable().keys() == model.projector.state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.trainable().values())
    assert not any(parameter.requires_grad for parameter in model.language.model.parameters())


def test_copies_share_the_llm_and_nothing_else(model: VisionLanguage) -> None:
    other = model.copied()
    assert other.language is model.language
    for name, parameter in other.trainable().items():
        assert torch.equal(parameter, model.trainable()[name])
        assert parameter.data_ptr() != model.trainable()[name].data_ptr()


def test_gradients_through_the_llm_are_those_from_its_visual_tokens_back(model: VisionLanguage) -> None:
    texts = [
        Text((*question(f"What is {word}?").turns, Turn("assistant", word))) for word in ("red", "a big one")
    ]
    samples = tokenise_all(texts, "plain", model.language.tokenizer, patches=PATCHES, max_length=64)
    ids, labels = model.language.collate(samples)
    features = torch.randn(2, PATCHES, D_VISION, generator=torch.Generator().manual_seed(1))
    cut = model.copied()

    losses, rows = model.losses(ids, labels, model.visual(features))
    losses.sum().backward()
    assert rows.bincount().tolist() == [sample.supervised for sample in samples]

    projected = cut.visual(features)
    visual = projected.detach().requires_grad_()
    for row in range(len(texts)):
        part = slice(row, row + 1)
        cut.losses(ids[part], labels[part], visual[part])[0].sum().backward()
    projected.backward(visual.grad)

    for name, parameter in cut.trainable().items():
        expected = model.trainable()[name].grad
        assert expected is not None
        assert float(expected.norm()) > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
