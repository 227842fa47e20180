"""Every encoder with every LLM: from the cache as from pixels through the models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_encoders import MAKERS, PREFIX, clip, experiment, save, siglip2, to_open_clip, whole_model
from test_export import TEXTS, WIDTH, llms  # noqa: F401
from transformers import AutoModelForCausalLM

from fedcmp.cli import main
from fedcmp.extract.encoders.patches import expand_to_square
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.export.hf import LANGUAGES
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import question, tokenise
from fedcmp.pipeline.options import Component

SHOWN = (2, 6)


@pytest.fixture(scope="module", params=[*MAKERS, pytest.param(None, id="open_clip")])
def cached(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, llama_dir: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures' features `(2, 16, 24)`: of a float32 cache, and of the whole encoder on their pixels."""
    maker: Callable[[], Any] = request.param or clip
    root = tmp_path_factory.mktemp("parity")
    folder = save(maker, root / "encoder")
    # open_clip and transformers crop an odd number of pixels on different sides.
    resize = "pad" if maker is siglip2 or request.param is None else "crop"
    encoder = f'{{ name = "transformers", path = "{folder}", resize = "{resize}" }}'
    if request.param is None:
        opened = to_open_clip(folder, root / "open")
        encoder = f'{{ name = "open_clip", model = "local-dir:{opened}", resize = "pad" }}'
    path = experiment(root, encoder, llama_dir)
    result = CliRunner().invoke(main, ["extract", str(path), "--set", "extract.dtype=float32"])
    assert result.exit_code == 0, result.output
    images = [Image.open(root / f"scans/{seed:03d}.png").convert("RGB") for seed in SHOWN]
    if resize == "pad":
        mean = (127, 127, 127) if maker is siglip2 else (122, 116, 104)
        images = [expand_to_square(image, mean) for image in images]
    states = whole_model(folder, images)[-2]
    return FeatureCache(root / "features/one.zarr").tensor(list(SHOWN)).clone(), states[:, PREFIX[maker] :][
        :, :16
    ]


@pytest.mark.parametrize("family", LANGUAGES)
def test_the_cache_answers_as_pixels_do(
    cached: tuple[torch.Tensor, torch.Tensor],
    family: str,
    llms: dict[str, Path],  # noqa: F811
) -> None:
    ours, theirs = cached
    projector = projectors.build(Component(name="mlp2x_gelu"), d_vision=24, d_llm=WIDTH)
    projectors.initialise(projector, torch.Generator().manual_seed(4))
    language = FrozenLanguageModel(llms[family], dtype="float32", device="cpu")
    whole = AutoModelForCausalLM.from_pretrained(llms[family]).eval()
    with torch.no_grad():
        projected, wanted = projector(ours), projector(theirs)
        samples = [tokenise(t, "chat", language.tokenizer, patches=16, max_length=200) for t in TEXTS]
        for row, sample in enumerate(samples):
            ids = torch.tensor([sample.ids])
            logits = language.head(
                language.decoder(
                    inputs_embeds=language.embed(ids, projected[row : row + 1])
                ).last_hidden_state
            )
            spliced = spliced_by_hand(whole, sample.ids, wanted[row])
            torch.testing.assert_close(whole(inputs_embeds=spliced).logits, logits, rtol=0, atol=1e-5)
    asked = [
        tokenise(question(q), "chat", language.tokenizer, patches=16, max_length=200)
        for q in ("what color?", "is there a small red circle at the top left?")
    ]
    said = language.generate(asked, projected, [0, 1], max_new_tokens=10, stop=None)
    for row, sample in enumerate(asked):
        spliced = spliced_by_hand(whole, sample.ids, wanted[row])
        tokens = whole.generate(inputs_embeds=spliced, max_new_tokens=10, do_sample=False)[0]
        assert said[row] == language.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def spliced_by_hand(model: Any, ids: list[int], visual: torch.Tensor) -> torch.Tensor:
    """Word embeddings around the visual tokens, one by one."""
    embeddings, rest = model.get_input_embeddings(), iter(visual)
    words = [embeddings(torch.tensor(token)) if token >= 0 else next(rest) for token in ids]
    return torch.stack([word.detach() for word in words])[None]
