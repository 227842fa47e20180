"""Local training of one or more clients in one round."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fedcmp.federate.arithmetic.paths import path_projector
from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.client.division import Division, Parts, micro_batches
from fedcmp.federate.client.share import Share, Whole
from fedcmp.federate.client.stream import Batch
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.privacy.steps import NoisySteps
from fedcmp.federate.strategies.base import Role
from fedcmp.pipeline.config import Optimizer
from fedcmp.pipeline.errors import DivergedError
from fedcmp.pipeline.models import lora
from fedcmp.pipeline.models.device import moved
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import IGNORE_INDEX
from fedcmp.pipeline.models.vision_language import VisionLanguage


def learning_rate(options: Optimizer, step: int, total: int) -> float:
    """Linear warm-up over a share of the run, then a cosine to zero."""
    warmup = options.warmup * total
    if step < warmup:
        return options.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(
    options: Optimizer, trained: Mapping[str, nn.Parameter], adapter_rate: float | None = None
) -> torch.optim.Optimizer:
    """The local optimiser over all that is trained; a group's `share` is of the learning rate.

    Args:
        options: Local optimisation.
        trained: What is trained, by name.
        adapter_rate: Learning rate of the adapter, if it has one of its own.
    """
    own = [parameter for name, parameter in trained.items() if name.startswith(lora.PREFIX)]
    rest = [parameter for name, parameter in trained.items() if not name.startswith(lora.PREFIX)]
    share = (adapter_rate or options.learning_rate) / options.learning_rate
    parameters = [{"params": each, "share": of} for each, of in ((rest, 1.0), (own, share)) if each]
    if options.name == "sgd":
        return torch.optim.SGD(
            parameters, options.learning_rate, options.momentum, weight_decay=options.weight_decay
        )
    return torch.optim.AdamW(parameters, options.learning_rate, weight_decay=options.weight_decay, fused=True)


@dataclass
class _Learner:
    """One client at work."""

    job: Job
    steps: int
    batches: Iterator[Batch]
    model: VisionLanguage
    optimizer: torch.optim.Optimizer
    trained: dict[str, nn.Parameter]
    penalties: Mapping[str, float]
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    gradient: State = field(default_factory=dict)

    def see(self, batch: Batch, predicted: int, through: float) -> None:
        """Count what a batch has, and FLOPs: those of its texts through the LLM, and of its projection."""
        self.samples += batch.size
        self.tokens += predicted
        pictures, patches, _ = batch.features.shape
        weights = sum(parameter.numel() for parameter in self.model.projector.parameters())
        self.flops += through + 6.0 * weights * pictures * patches

    @property
    def follows(self) -> bool:
        """Whether the mean gradient along the path is needed."""
        return self.job.update == "path" or "gradient" in self.job.wants

    def take(self, noisy: NoisySteps, features: Tensor, visual: Tensor, units: Tensor) -> None:
        """Take the private gradient of a batch."""
        try:
            gradient = noisy.gradient(self.model.projector, features, visual, units)
        except ValueError as error:
            raise DivergedError(f"client '{self.job.client}', round {self.job.round}: {error}") from None
        for name, parameter in self.trained.items():
            parameter.grad = gradient[name]

    def step(self, step: int, options: Optimizer) -> None:
        """Clip the loss's gradient, add the objective's, and move."""
        rate = learning_rate(options, self.job.round * self.steps + step, self.job.rounds * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["share"]
        nn.utils.clip_grad_norm_(self.trained.values(), options.max_grad_norm)
        proximal, linear = self.job.objective.proximal, self.job.objective.linear
        for name, parameter in self.trained.items():
            assert parameter.grad is not None
            if self.follows:
                mean = self.gradient.setdefault(name, torch.zeros_like(parameter.grad))
                mean.add_(parameter.grad, alpha=1 / self.steps)
            if proximal:
                start = self.job.start[name].to(parameter.device)
                parameter.grad.add_(parameter.detach() - start, alpha=proximal)
            if linear is not None:
                parameter.grad.add_(linear[name].to(parameter.grad))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def train_together(
    jobs: Sequence[Job],
    batches: Sequence[tuple[int, Iterator[Batch]]],
    model: VisionLanguage,
    options: Optimizer,
    *,
    micro_batch: int,
    micro_tokens: int | None = None,
    advance: Callable[[int], None],
    noisy: NoisySteps | None = None,
    adapter_rate: float | None = None,
    share: Share | None = None,
    role: Callable[[Job], Role | None] = lambda job: None,
) -> list[LocalResult]:
    """Train clients over one round's batches; the LLM stays frozen and is shared.

    Every client has its own projector and optimiser. Their samples go through the LLM together,
    sorted by length into micro-batches; summing the clients' mean losses keeps their gradients apart.
    A client alone has one micro-batch in memory at a time, projector included.

    Args:
        jobs: Who trains, from where.
        batches: Each client's number of steps, at least one, and its batches.
        model: The frozen LLM behind a projector of the right architecture, which every client gets a copy of.
        options: Local optimisation.
        micro_batch: Samples a forward pass of the LLM has at most.
        micro_tokens: Tokens that it has at most, padding and visual tokens included.
        advance: Called with the number of clients after each of their steps.
        noisy: How steps keep samples private, if they do; every sample then counts alike, however many
            texts and tokens it has.
        adapter_rate: Learning rate of the adapter, if it has one of its own.
        share: Which micro-batches are computed here; all by default, as they are where several clients
            train together or steps are noisy.
        role: What a client does; one with losses of its projector's own trains alone.

    Raises:
        DivergedError: A loss or a gradient is not finite.
    """
    began = time.monotonic()
    learners = [
        _learner(job, steps, own, model.copied(), options, adapter_rate, role(job))
        for job, (steps, own) in zip(jobs, batches, strict=True)
    ]
    share = share or Whole()
    divided = partial(micro_batches, samples=micro_batch, tokens=micro_tokens)
    alone = len(learners) == 1 and noisy is None
    losses: list[Tensor] = []
    for step in range(max(learner.steps for learner in learners)):
        active = [place for place, learner in enumerate(learners) if step < learner.steps]
        if alone:
            losses.append(_in_parts(learners[0], divided, share))
        else:
            sums = torch.zeros(len(learners), dtype=torch.float64, device=model.language.device)
            sums[active] = _backward([learners[place] for place in active], divided, noisy)
            losses.append(sums)
        for place in active:
            learners[place].step(step, options)
        advance(len(active))
    totals = torch.stack(losses).cpu().cumsum(0)[-1]
    seconds = time.monotonic() - began
    samples = sum(learner.samples for learner in learners)
    return [
        _result(learner, total / learner.tokens, options, seconds * learner.samples / samples)
        for learner, total in zip(learners, totals.tolist(), strict=True)
    ]


def _learner(
    job: Job,
    steps: int,
    batches: Iterator[Batch],
    model: VisionLanguage,
    options: Optimizer,
    adapter_rate: float | None,
    role: Role | None,
) -> _Learner:
    model.load(job.start)
    trained = {}
    for name, parameter in model.trainable().items():
        parameter.requires_grad_(role is None or name.startswith(role.trains))
        if parameter.requires_grad:
            trained[name] = parameter
    if role is not None:
        model.projector.leave_only(role.task)
    optimizer = make_optimizer(options, trained, adapter_rate)
    if job.optimizer is not None:
        optimizer.load_state_dict(job.optimizer)
    penalties = {} if role is None else role.penalties
    return _Learner(job, steps, batches, model, optimizer, trained, penalties)


def _result(learner: _Learner, loss: float, options: Optimizer, seconds: float) -> LocalResult:
    if not math.isfinite(loss):
        raise DivergedError(
            f"client '{learner.job.client}', round {learner.job.round}: the loss is {loss}; lower "
            f"federate.optimizer.learning_rate ({options.learning_rate:g})"
        )
    job, state = learner.job, learner.model.state()
    gradient = {name: mean.cpu() for name, mean in learner.gradient.items()}
    return LocalResult(
        client=job.client,
        state=path_projector(job.start, state, gradient) if job.update == "path" else state,
        loss=loss,
        samples=learner.samples,
        steps=learner.steps,
        tokens=learner.tokens,
        seconds=seconds,
        flops=learner.flops,
        optimizer=learner.optimizer.state_dict() if options.carry else None,
        gradient=gradient if "gradient" in job.wants else None,
    )


def _in_parts(learner: _Learner, divided: Division, share: Share) -> Tensor:
    """The gradient of one client's mean loss; returns the `(1,)` float64 sum of losses.

    The graph of a micro-batch is gone before the next one is begun.
    """
    batch, model = next(learner.batches), learner.model
    count = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
    device = model.language.device
    parts = divided(batch.labels)
    learner.see(batch, count, _flops(model.language, parts, count))
    parameters = list(learner.trained.values())

    def computed(number: int) -> list[Tensor]:
        """A micro-batch's part of every gradient, and its sum of losses."""
        rows, length = parts[number]
        # Pictures as they come in the batch: sums over all of them do not depend on how long their texts are.
        ordered, places = rows.sort()
        visual, own = model.visual_parts(batch.features[moved(ordered, device)])
        losses, _ = model.losses(
            batch.ids[rows, :length],
            batch.labels[rows, :length],
            visual[moved(places.argsort(), device)],
        )
        learner.optimizer.zero_grad(set_to_none=True)
        loss = (losses * (1 / count)).sum()
        for name, factor in learner.penalties.items():
            loss = loss + factor * len(rows) / batch.size * own[name]
        loss.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return [*gradients, losses.detach().sum(dtype=torch.float64).view(1)]

    total = torch.empty(1, dtype=torch.float64, device=device)
    *gradients, total = share.summed(len(parts), computed, [*parameters, total])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return total


def _backward(learners: Sequence[_Learner], divided: Division, noisy: NoisySteps | None) -> Tensor:
    """Gradients of every client's mean loss; returns `(clients,)` float64 sums of losses."""
    batches = [next(learner.batches) for learner in learners]
    width = max(batch.ids.shape[1] for batch in batches)
    ids = torch.cat([pad(batch.ids, (0, width - batch.ids.shape[1])) for batch in batches])
    labels = torch.cat(
        [pad(batch.labels, (0, width - batch.labels.shape[1]), value=IGNORE_INDEX) for batch in batches]
    )
    counts = [int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in batches]
    # The LLM is one for all, and frozen: its passes leave their gradients at the visual tokens.
    model, parts = learners[0].model, divided(labels)
    device = model.language.device
    flops = _flops(model.language, parts, sum(counts))
    for learner, batch, count in zip(learners, batches, counts, strict=True):
        learner.see(batch, count, flops * len(batch.ids) / len(ids))
    client = torch.arange(len(batches)).repeat_interleave(torch.tensor([len(b.ids) for b in batches]))
    owners, units = _owners(batches), _units(batches)
    if noisy is None:
        weights = 1 / torch.tensor(counts, dtype=torch.float32)[client]
    else:
        weights = 1 / (_tokens(labels) * units[owners].bincount()[units[owners]])
    projected = torch.cat([each.model.visual(b.features) for each, b in zip(learners, batches, strict=True)])
    visual = projected.detach().requires_grad_()
    sums = torch.zeros(len(learners), dtype=torch.float64, device=device)
    for rows, length in parts:
        shown = visual[moved(owners[rows], device)]
        losses, row = model.losses(ids[rows, :length], labels[rows, :length], shown)
        (losses * moved(weights[rows], device)[row]).sum().backward()
        sums.index_add_(0, moved(client[rows], device)[row], losses.detach().double())
    assert visual.grad is not None
    if noisy is None:
        projected.backward(visual.grad)
        return sums
    sizes = [len(batch.features) for batch in batches]
    each_own = zip(visual.grad.split(sizes), units.split(sizes), strict=True)
    for learner, batch, (own, of) in zip(learners, batches, each_own, strict=True):
        learner.take(noisy, batch.features, own, of)
    return sums


def _flops(language: FrozenLanguageModel, parts: Parts, predicted: int) -> float:
    """Of micro-batches through the LLM and back."""
    shape, again = language.shape, language.checkpointing
    texts = sum(len(rows) * shape.training_flops(length, 0, again) for rows, length in parts)
    return texts + shape.training_flops(0, predicted, again)


def _owners(batches: Sequence[Batch]) -> Tensor:
    """`(texts,)` int64: which of all rows of features each text is about."""
    owners, before = [], 0
    for batch in batches:
        own = torch.arange(len(batch.ids)) if batch.owners is None else batch.owners
        owners.append(before + own)
        before += len(batch.features)
    return torch.cat(owners)


def _units(batches: Sequence[Batch]) -> Tensor:
    """`(pictures,)` int64: which of all samples each row of features is of."""
    units, before = [], 0
    for batch in batches:
        own = torch.arange(batch.size) if batch.units is None else batch.units
        units.append(before + own)
        before += batch.size
    return torch.cat(units)


def _tokens(labels: Tensor) -> Tensor:
    """`(texts,)` supervised tokens, at least one so that it can be divided by."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(1).clamp(min=1)
