"""Rewards on a common scale, and how much each of them counts for a prompt: pure arithmetic.

MoR (arXiv 2602.00485, revised as 2605.03426), in our reading of its abstracts; K reward models.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

_ROUNDING = 1e-6


def context(visual: Tensor, words: Tensor) -> Tensor:
    """What a router sees of prompts: h(x) = 4 [v̄ / ‖v̄‖; q̄ / ‖q̄‖; 1/4].

    Args:
        visual: Mean visual token of each picture under the reference, `(n, d)`.
        words: Mean word embedding of each question, `(n, d)`.

    Returns:
        `(n, 2 d + 1)` float32.
    """
    ones = torch.full((len(visual), 1), 0.25, device=visual.device)
    return 4 * torch.cat([normalize(visual.float(), dim=1), normalize(words.float(), dim=1), ones], 1)


def weights(omega: Tensor, h: Tensor, *, uniform: float, temperature: float = 1.0) -> Tensor:
    """π(x) = (1 - u) softmax(Ω h(x) / τ) + u / K.

    Args:
        omega: Ω, `(K, features)`.
        h: `(n, features)`.
        uniform: u.
        temperature: τ.

    Returns:
        `(n, K)`; each row sums to one.
    """
    return (1 - uniform) * (h @ omega.T / temperature).softmax(1) + uniform / len(omega)


def fused(pi: Tensor, rewards: Tensor) -> Tensor:
    """R = Σ_k π_k r̃_k, where what counts nothing is not looked at.

    Args:
        pi: `(n, K)`.
        rewards: r̃, `(K, n)`.

    Returns:
        `(n,)`.
    """
    return torch.where(pi.T > 0, pi.T * rewards, 0.0).sum(0)


def deviations(rewards: Tensor) -> Tensor:
    """σ_k: deviation of each reward within groups of answers to one prompt.

    Args:
        rewards: `(K, prompts, answers)`.

    Returns:
        `(K,)`, 1 for a reward that tells no answers apart.
    """
    spread = (rewards - rewards.mean(2, keepdim=True)).square().mean((1, 2)).sqrt()
    return torch.where(spread > _ROUNDING * rewards.abs().mean((1, 2)), spread, 1.0)


def centred(rewards: Tensor, copies: int) -> Tensor:
    """Rewards without the mean of each group, which would cancel later and costs digits until then.

    Args:
        rewards: `(K, answers)`, so many to each prompt side by side.
        copies: How many.
    """
    groups = rewards.view(len(rewards), -1, copies)
    return (groups - groups.mean(2, keepdim=True)).flatten(1)


def domain_gradient(omega: Tensor, h: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """Of Σ_x -log softmax(Ω h(x))_label: "whose prompt is it"; sums over clients are pooled training.

    Returns:
        The gradient `(K, features)` and the sum of losses `()`.
    """
    logits = h @ omega.T
    wanted = one_hot(torch.tensor(label, device=h.device), len(omega)).to(h)
    return (logits.softmax(1) - wanted).T @ h, -logits.log_softmax(1)[:, label].sum()


def preference_loss(
    omega: Tensor, h: Tensor, margins: Tensor, *, uniform: float, temperature: float
) -> Tensor:
    """Mean of -log σ(Σ_k π_k(x) Δr̃_k).

    Args:
        omega: Ω, `(K, features)`.
        h: `(n, features)`.
        margins: Δr̃ of chosen and rejected answers, `(K, n)`.
        uniform: u.
        temperature: τ.
    """
    mixed = fused(weights(omega, h, uniform=uniform, temperature=temperature), margins)
    return -torch.nn.functional.logsigmoid(mixed).mean()
