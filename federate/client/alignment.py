"""What each layer of a client's projector contributes to aligning visual tokens with texts.

Layer l contributes what is lost without its training: the measure of the trained projector against that of
the trained one with weight and bias of l as they were at the start.

`likelihood`: the rise of the frozen LLM's mean loss a supervised token, in nats. It asks the model that the
projector is for, at the price of a forward pass of the LLM for every layer and one more.

`cka`: the fall of linear CKA (Kornblith et al., 2019, arXiv 1905.00414), which takes no pass of the LLM. For
samples j = 1..n, x_j is the mean of a picture's projected visual tokens and y_j the mean of the LLM's input
embeddings of the sample's supervised tokens, both in R^d_llm. With the rows of X and Y centred,

    A(P) = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) = ⟨X Xᵀ, Y Yᵀ⟩ / (‖X Xᵀ‖ ‖Y Yᵀ‖)   in [0, 1]

which depends neither on scale nor on a rotation or shift of either space.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import Measure, State
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
    trained: Mapping[str, Tensor],
    batches: Iterable[Batch],
    measure: Measure,
) -> dict[str, float]:
    """What training each layer contributed to the alignment, by name of its weight matrix.

    Args:
        model: Gives the architecture, the embeddings and the loss; what is trained in it is overwritten.
        start: Weights before training.
        trained: Weights after training.
        batches: At least one, on the LLM's device; each is taken once.
        measure: Of the alignment.
    """
    matrices = [name for name, tensor in trained.items() if tensor.ndim == 2]
    variants = {"": dict(trained)} | {matrix: _without(matrix, start, trained) for matrix in matrices}
    aligned = _likelihoods if measure == "likelihood" else _ckas
    of = aligned(model, variants, batches)
    return {matrix: of[""] - of[matrix] for matrix in matrices}


def _likelihoods(
    model: VisionLanguage, variants: Mapping[str, State], batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean log-likelihood of a supervised token, in nats, by variant."""
    sums, tokens = dict.fromkeys(variants, 0.0), 0
    for batch in batches:
        for name, state in variants.items():
            model.load(state)
            losses, _ = model.losses(batch.ids, batch.labels, model.visual(batch.features))
            sums[name] -= float(losses.double().sum())
        tokens += len(losses)
    return {name: each / tokens for name, each in sums.items()}


def _ckas(model: VisionLanguage, variants: Mapping[str, State], batches: Iterable[Batch]) -> dict[str, float]:
    """Linear CKA of visual tokens and text embeddings by variant."""
    visual: dict[str, list[Tensor]] = {name: [] for name in variants}
    texts = []
    for batch in batches:
        answered = (batch.labels != IGNORE_INDEX).any(1)
        texts.append(_mean_embeddings(batch.labels[answered].to(model.language.device), model.language))
        for name, state in variants.items():
            model.load(state)
            visual[name].append(model.visual(batch.features[answered]).double().mean(1))
    y = torch.cat(texts)
    return {name: linear_cka(torch.cat(x), y) for name, x in visual.items()}


def _without(matrix: str, start: State, trained: Mapping[str, Tensor]) -> State:
    """The trained weights, with one layer as it was at the start."""
    layer = matrix.rpartition(".")[0] + "."
    return {name: start[name] if name.startswith(layer) else tensor for name, tensor in trained.items()}


def _mean_embeddings(labels: Tensor, language: FrozenLanguageModel) -> Tensor:
    """Mean input embedding of every sample's supervised tokens, float64 `(batch, d_llm)`."""
    supervised = (labels != IGNORE_INDEX).double().unsqueeze(-1)
    embeddings = language.words(labels.clamp(min=0)).double()
    return (embeddings * supervised).sum(1) / supervised.sum(1)
