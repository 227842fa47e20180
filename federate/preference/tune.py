"""A silo's part of FedDPO, or of learning what was chosen: baselines, whose weights leave the silo."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.client.step import learning_rate, make_optimizer
from fedcmp.federate.preference.candidates import Candidates, log_probs
from fedcmp.federate.preference.dpo import chosen_loss, dpo_loss
from fedcmp.federate.preference.fit import batches
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.pairs import Pairs
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.vision_language import VisionLanguage


def tune(
    ground: Ground,
    pairs: Pairs,
    experiment: Experiment,
    state: Mapping[str, Tensor],
    round_: int,
    seed: Sequence[int],
) -> tuple[State, float]:
    """A pass over a silo's preferences from a state, `federate.micro_batch` pairs a step.

    Args:
        ground: The reference.
        pairs: The preferences.
        experiment: The experiment.
        state: Where to start.
        round_: Number of the round, of `align.average`, which set the learning rate.
        seed: Of the order, besides the experiment's.

    Returns:
        Where it ends, and the mean loss.

    Raises:
        UserError: The loss is not finite.
    """
    align, options = experiment.align, experiment.federate
    assert align is not None
    model = ground.model.copied()
    model.load(state)
    trained = model.trainable()
    schedule = options.optimizer.model_copy(update={"learning_rate": align.learning_rate})
    optimizer = make_optimizer(schedule, trained, options.adapter.learning_rate if options.adapter else None)
    size = options.micro_batch or options.batch_size
    steps = batches(len(pairs), size, [experiment.seed, *seed], range(round_, round_ + 1))
    losses = []
    for step, places in enumerate(steps, round_ * len(steps)):
        rate = learning_rate(schedule, step, align.average * len(steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        candidates = pairs.candidates(places)
        # First, as it changes the adapter, if there is one, and puts it back.
        with torch.no_grad(), ground.as_reference():
            reference, _ = _sums(ground.model, candidates)
        new, tokens = _sums(model, candidates)
        dpo = align.method == "dpo"
        loss = dpo_loss(new, reference, align.beta) if dpo else chosen_loss(new, tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), schedule.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    mean = math.fsum(losses) / len(losses)
    if not math.isfinite(mean):
        raise UserError(f"the loss is {mean}; lower align.learning_rate ({align.learning_rate:g})")
    return model.state(), mean


def _sums(model: VisionLanguage, candidates: Candidates) -> tuple[Tensor, Tensor]:
    """Sums of log p over each answer, and its tokens: `(pairs, 2)` each."""
    values, rows = log_probs(model, candidates, model.visual(candidates.features))
    sums = values.new_zeros(len(candidates)).index_add(0, rows, values)
    return sums.view(-1, 2), rows.bincount(minlength=len(candidates)).view(-1, 2)
