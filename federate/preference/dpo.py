"""DPO (Rafailov et al., 2023, arXiv 2305.18290), and the likelihood of what was chosen: pure arithmetic."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(new: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Mean of -log σ(β [(log p_θ - log p_ref)(chosen) - (log p_θ - log p_ref)(rejected)]).

    Args:
        new: Sums of log p_θ over each answer, `(pairs, 2)` of chosen and rejected.
        reference: Of the reference.
        beta: β.
    """
    gained = beta * (new - reference)
    return -logsigmoid(gained[:, 0] - gained[:, 1]).mean()


def chosen_loss(new: Tensor, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of a token of what was chosen.

    Args:
        new: As in `dpo_loss`.
        tokens: Tokens of each answer, `(pairs, 2)`.
    """
    return -new[:, 0].sum() / tokens[:, 0].sum()
