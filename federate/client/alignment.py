"""How well visual tokens are aligned with text embeddings, and what each layer contributes to it.

For samples j = 1..n, x_j is the mean of a picture's projected visual tokens and y_j the mean of the
LLM's input embeddings of the sample's supervised tokens, both in R^d_llm. With the rows of X and Y
centred, the alignment of projector P is linear CKA (Kornblith et al., 2019, arXiv 1905.00414):

    A(P) = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) = ⟨X Xᵀ, Y Yᵀ⟩ / (‖X Xᵀ‖ ‖Y Yᵀ‖)   in [0, 1]

It depends neither on scale nor on a rotation or shift of either space. Layer l contributes what is
lost without its training: A(trained) - A(trained, with weight and bias of l as they were at the start).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.func import functional_call

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.client.stream import Batch
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import IGNORE_INDEX
from fedcmp.pipeline.models.vision_language import VisionLanguage

_CONSTANT = 1e-9


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two representations of the same samples; 0 where one of them is constant.

    Args:
        x: `(n, d_x)`; n x n matrices are formed, so n should stay in the thousands.
        y: `(n, d_y)`.
    """
    grams = []
    for each in (x.double(), y.double()):
        centred = each - each.mean(0)
        # Equal rows leave rounding when centred, and CKA would blow that up to any value.
        if centred.norm() <= _CONSTANT * each.norm():
            return 0.0
        grams.append(centred @ centred.T)
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm()))


@torch.no_grad()
def alignment_contributions(
    model: VisionLanguage,
    start: State,
    trained: State,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """What training each layer contributed to the alignment, by name of its weight matrix.

    Args:
        model: Its projector gives the architecture and the device, its LLM the input embeddings; the
            projector's weights are neither used nor changed.
        start: Weights before training.
        trained: Weights after training.
        batches: At least one, on the LLM's device; each is taken once.
    """
    device = next(model.projector.parameters()).device
    matrices = [name for name, tensor in trained.items() if tensor.ndim == 2]
    variants = {"": trained} | {matrix: _without(matrix, start, trained) for matrix in matrices}
    variants = {name: {n: t.to(device) for n, t in state.items()} for name, state in variants.items()}
    visual: dict[str, list[Tensor]] = {name: [] for name in variants}
    texts = []
    for batch in batches:
        answered = (batch.labels != IGNORE_INDEX).any(1)
        texts.append(_mean_embeddings(batch.labels[answered], model.language))
        for name, state in variants.items():
            tokens = functional_call(model.projector, state, (batch.features[answered],))
            visual[name].append(tokens.double().mean(1))
    y = torch.cat(texts)
    alignment = {name: linear_cka(torch.cat(x), y) for name, x in visual.items()}
    return {matrix: alignment[""] - alignment[matrix] for matrix in matrices}


def _without(matrix: str, start: State, trained: State) -> State:
    """The trained weights, with one layer as it was at the start."""
    layer = matrix.rpartition(".")[0] + "."
    return {name: start[name] if name.startswith(layer) else tensor for name, tensor in trained.items()}


def _mean_embeddings(labels: Tensor, language: FrozenLanguageModel) -> Tensor:
    """Mean input embedding of every sample's supervised tokens, float64 `(batch, d_llm)`."""
    supervised = (labels != IGNORE_INDEX).double().unsqueeze(-1)
    embeddings = language.words(labels.clamp(min=0)).double()
    return (embeddings * supervised).sum(1) / supervised.sum(1)
