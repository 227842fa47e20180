"""One silo's local training in one round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from federate.batches import Batch
from federate.strategies.base import State
from pipeline.config import Optimizer
from pipeline.errors import UserError
from pipeline.language import FrozenLanguageModel
from pipeline.projector import state_of


@dataclass(frozen=True)
class LocalResult:
    """A client's projector after its local steps.

    `loss` is the mean negative log-likelihood a supervised token, in nats, over the round.
    """

    state: State
    loss: float
    samples: int
    tokens: int
    seconds: float
    optimizer: dict[str, Any]


def learning_rate(options: Optimizer, step: int, total: int) -> float:
    """Linear warm-up over a share of the pass, then a cosine to zero."""
    warmup = options.warmup * total
    if step < warmup:
        return options.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(options: Optimizer, projector: nn.Module) -> torch.optim.Optimizer:
    """The local optimiser over the projector's parameters."""
    parameters = projector.parameters()
    if options.name == "sgd":
        return torch.optim.SGD(
            parameters, options.learning_rate, options.momentum, weight_decay=options.weight_decay
        )
    return torch.optim.AdamW(parameters, options.learning_rate, weight_decay=options.weight_decay, fused=True)


def train_locally(
    projector: nn.Module,
    start: State,
    language: FrozenLanguageModel,
    batches: Iterable[Batch],
    options: Optimizer,
    *,
    first_step: int,
    total_steps: int,
    optimizer_state: dict[str, Any] | None,
    advance: Callable[[], None],
) -> LocalResult:
    """Train a projector over one round's batches; the LLM stays frozen.

    Args:
        projector: Scratch module whose weights are overwritten with `start`.
        start: Where the client begins.
        language: The frozen LLM.
        batches: The round's batches, at least one.
        options: Local optimisation.
        first_step: Steps this client has done in earlier rounds.
        total_steps: Steps of this client's whole pass.
        optimizer_state: Moments to go on from, or None.
        advance: Called after every step.

    Raises:
        UserError: The loss is not finite.
    """
    began = time.monotonic()
    projector.load_state_dict(start)
    optimizer = make_optimizer(options, projector)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    loss_sum, tokens, samples = 0.0, 0, 0
    for step, batch in enumerate(batches, first_step):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, total_steps)
        losses, _ = language.token_losses(batch.ids, batch.labels, projector(batch.features))
        optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()
        nn.utils.clip_grad_norm_(projector.parameters(), options.max_grad_norm)
        optimizer.step()
        total = float(losses.detach().sum())
        if not math.isfinite(total):
            raise UserError(
                f"step {step}: the loss is {total}; lower federate.optimizer.learning_rate "
                f"({options.learning_rate:g})"
            )
        loss_sum, tokens, samples = loss_sum + total, tokens + len(losses), samples + len(batch.ids)
        advance()
    return LocalResult(
        state=state_of(projector),
        loss=loss_sum / max(tokens, 1),
        samples=samples,
        tokens=tokens,
        seconds=time.monotonic() - began,
        optimizer=optimizer.state_dict(),
    )
