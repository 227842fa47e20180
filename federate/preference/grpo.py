"""GRPO (Shao et al., 2024, arXiv 2402.03300) with token-normalised losses, as DAPO and TRL have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_LEAST = 1e-4


def advantages(rewards: Tensor, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """A_i = (R_i - mean) / (std + 10⁻⁴), the mean of each group.

    Args:
        rewards: `(prompts, answers)`.
        scale: Whose deviation: of each group, of all answers from the means of their groups, or none.

    Returns:
        `(prompts, answers)`; zero where all answers of a group are as good.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    if scale == "none":
        return centred
    deviation = rewards.std(1, keepdim=True) if scale == "group" else centred.square().mean().sqrt()
    return centred / (deviation + _LEAST)


@dataclass(frozen=True)
class Terms:
    """Of each token: the loss, the distance from the reference, and whether the ratio was clipped.

    Attributes:
        loss: `(tokens,)`.
        kl: e^δ - δ - 1 with δ = log p_ref - log p_θ, `(tokens,)`.
        clipped: `(tokens,)` bool.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def terms(
    new: Tensor, old: Tensor, reference: Tensor, advantage: Tensor, *, epsilon: float, beta: float
) -> Terms:
    """-min(ρ A, clip(ρ, 1 ± ε) A) + β KL of each token; their mean over all tokens is the loss.

    Args:
        new: log p_θ of each token, `(tokens,)`.
        old: Of the policy that sampled it.
        reference: Of the reference.
        advantage: Of its answer.
        epsilon: ε.
        beta: β.
    """
    ratio = (new - old).exp()
    kept = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    delta = reference - new
    kl = delta.exp() - delta - 1
    clipped = ((ratio < 1 - epsilon) & (advantage < 0)) | ((ratio > 1 + epsilon) & (advantage > 0))
    return Terms(beta * kl - kept, kl.detach(), clipped)
