"""Fit a reward model to a silo's preferences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from fedcmp.federate.client.step import learning_rate
from fedcmp.federate.preference.pairs import Pairs
from fedcmp.federate.preference.rewards import Judge, Reward
from fedcmp.pipeline.config import Optimizer
from fedcmp.pipeline.errors import UserError


def batches(pairs: int, size: int, seed: Sequence[int], epochs: range) -> list[list[int]]:
    """Places of the pairs of each step; every epoch has an order of its own."""
    orders = [np.random.default_rng([*seed, epoch]).permutation(pairs).tolist() for epoch in epochs]
    return [order[start : start + size] for order in orders for start in range(0, pairs, size)]


def fit(
    judge: Judge,
    options: Reward,
    pairs: Pairs,
    *,
    seed: Sequence[int],
    epochs: range,
    advance: Callable[[], None] = lambda: None,
) -> float | None:
    """Minimise -log σ(r⁺ - r⁻) + `decay` r² in place; returns the mean of the first in the last epoch.

    Args:
        judge: The reward model.
        options: How.
        pairs: The preferences.
        seed: Of their order.
        epochs: Which of `options.epochs` to go through; the learning rate is that of all.
        advance: Called after every step.

    Raises:
        UserError: The loss is not finite.
    """
    trained = [parameter for parameter in judge.parameters() if parameter.requires_grad]
    a_pass = -(-len(pairs) // options.batch_size)
    schedule = Optimizer(learning_rate=options.learning_rate)
    if not trained or not epochs or not len(pairs):
        return None
    optimizer = torch.optim.AdamW(trained, options.learning_rate, weight_decay=0.0)
    losses = []
    first, total = epochs.start * a_pass, options.epochs * a_pass
    for step, places in enumerate(batches(len(pairs), options.batch_size, seed, epochs), first):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, total)
        rewards = judge(pairs.candidates(places)).view(-1, 2)
        loss = -logsigmoid(rewards[:, 0] - rewards[:, 1]).mean()
        optimizer.zero_grad()
        (loss + options.decay * rewards.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, schedule.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
        advance()
    mean = math.fsum(losses[-a_pass:]) / a_pass
    if not math.isfinite(mean):
        raise UserError(
            f"the reward model's loss is {mean}; lower its learning_rate ({options.learning_rate:g})"
        )
    return mean


@torch.no_grad()
def accuracy(judge: Judge, pairs: Pairs, size: int) -> float | None:
    """Share of pairs whose chosen answer has the higher reward; None without pairs."""
    right = 0
    for start in range(0, len(pairs), size):
        rewards = judge(pairs.candidates(range(start, min(start + size, len(pairs))))).view(-1, 2)
        right += int((rewards[:, 0] > rewards[:, 1]).sum())
    return right / len(pairs) if len(pairs) else None
