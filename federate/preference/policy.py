"""The policy at the server: it samples answers, and moves by GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.client.step import learning_rate, make_optimizer
from fedcmp.federate.preference.candidates import Candidates, log_probs
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.grpo import terms
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.models.decoding import drawn
from fedcmp.pipeline.models.vision_language import VisionLanguage


@dataclass(frozen=True)
class Generation:
    """Answers that were sampled together.

    Attributes:
        places: `(questions, 2)` int64 of (kind, number).
        candidates: Their answers, as many to each.
        old: log p of every token under the policy that sampled it, `(tokens,)`.
        reference: The same under the reference.
        rows: `(tokens,)` int64 on the CPU: the answer of each.
    """

    places: np.ndarray
    candidates: Candidates
    old: Tensor
    reference: Tensor
    rows: Tensor

    @property
    def answers(self) -> list[list[list[int]]]:
        """Of each question."""
        copies = len(self.candidates) // len(self.places)
        flat = self.candidates.answers
        return [list(flat[start : start + copies]) for start in range(0, len(flat), copies)]

    @property
    def kl(self) -> float:
        """Distance from the reference: the mean of e^δ - δ - 1 over sampled tokens, in nats."""
        delta = (self.reference - self.old).double()
        return float((delta.exp() - delta - 1).mean())


@dataclass(frozen=True)
class Moved:
    """Means over the tokens of a step."""

    loss: float
    kl: float
    clipped: float


class Policy:
    """What is trained: a copy of the reference's projector, and the LLM's adapter where it has one.

    Args:
        ground: The LLM and the reference.
        experiment: The experiment.
    """

    def __init__(self, ground: Ground, experiment: Experiment) -> None:
        align, options = experiment.align, experiment.federate
        assert align is not None
        self._ground, self._align, self._seed = ground, align, experiment.seed
        self._at_once, self._micro = options.batch_size, options.micro_batch or options.batch_size
        self.model = ground.model.copied()
        self._trained = self.model.trainable()
        for parameter in self._trained.values():
            parameter.requires_grad_(True)
        self._schedule = options.optimizer.model_copy(update={"learning_rate": align.learning_rate})
        rate = options.adapter.learning_rate if options.adapter else None
        self.optimizer = make_optimizer(self._schedule, self._trained, rate)

    def state(self) -> State:
        """A copy of what is trained."""
        return self.model.state()

    def sample(self, places: np.ndarray, seed: Sequence[int], copies: int) -> Candidates:
        """Answers to public questions, drawn at temperature 1.

        Args:
            places: `(questions, 2)` int64 of (kind, number).
            seed: What is drawn depends on it and the experiment's alone.
            copies: Answers to each.
        """
        length = self._align.max_new_tokens
        return sample(self.model, self._ground, places, [self._seed, *seed], copies, length, self._at_once)

    def generate(self, places: np.ndarray, seed: Sequence[int]) -> Generation:
        """Answers to questions with what the policy and the reference make of them."""
        candidates = self.sample(places, seed, self._align.num_generations)
        old, rows = self._log_probs(self.model, candidates)
        with self._ground.as_reference():
            reference, _ = self._log_probs(self._ground.model, candidates)
        return Generation(places, candidates, old, reference, rows)

    @torch.no_grad()
    def _log_probs(self, model: VisionLanguage, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """Of every token, and the answer of each, in parts of similar length."""
        lengths = torch.tensor([len(answer) for answer in candidates.answers])
        starts = lengths.cumsum(0) - lengths
        values = torch.empty(int(lengths.sum()), device=self._ground.language.device)
        for rows in candidates.by_length(self._micro):
            part = candidates.part(rows)
            own, _ = log_probs(model, part, model.visual(part.features))
            places = torch.cat([torch.arange(int(lengths[row])) + starts[row] for row in rows])
            values[places.to(values.device)] = own
        return values, torch.arange(len(lengths)).repeat_interleave(lengths)

    def step(self, number: int, generation: Generation, chosen: range, advantage: Tensor) -> Moved:
        """Move once, by the answers to some of a generation's questions.

        Args:
            number: Of the step, which sets the learning rate.
            generation: The answers.
            chosen: Which of its questions.
            advantage: Of every answer of the generation, `(answers,)` float32 on the CPU.
        """
        align, device = self._align, self._ground.language.device
        copies = align.num_generations
        own = list(range(chosen.start * copies, chosen.stop * copies))
        mine = (generation.rows >= own[0]) & (generation.rows <= own[-1])
        total = int(mine.sum())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._schedule, number, align.steps) * group["share"]
        self.optimizer.zero_grad()
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for rows in generation.candidates.part(own).by_length(self._micro):
            answers = [own[row] for row in rows]
            part = generation.candidates.part(answers)
            new, of = log_probs(self.model, part, self.model.visual(part.features))
            tokens = torch.cat([(generation.rows == answer).nonzero().flatten() for answer in answers]).to(
                device
            )
            made = terms(
                new,
                generation.old[tokens],
                generation.reference[tokens],
                advantage[answers].to(device)[of],
                epsilon=align.epsilon,
                beta=align.beta,
            )
            (made.loss.sum() / total).backward()
            sums += torch.stack([each.detach().double().sum() for each in (made.loss, made.kl, made.clipped)])
        nn.utils.clip_grad_norm_(self._trained.values(), self._schedule.max_grad_norm)
        self.optimizer.step()
        return Moved(*(sums / total).tolist())


def sample(
    model: VisionLanguage,
    ground: Ground,
    places: np.ndarray,
    seed: Sequence[int],
    copies: int,
    length: int,
    at_once: int,
) -> Candidates:
    """Answers of a policy to public questions, drawn at temperature 1; see `Policy.sample`."""
    unanswered = ground.public.candidates(places, [[[]]] * len(places))
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
    answers: list[list[list[int]]] = [[] for _ in places]
    ends = [ground.asking.ends(text) for text in unanswered.texts]
    with torch.inference_mode():
        for rows in _alike(ends, max(at_once // copies, 1)):
            part = unanswered.part(rows)
            said = drawn(
                ground.language,
                part.prompts,
                model.visual(part.features),
                part.owners.tolist(),
                copies=copies,
                length=length,
                ends=ends[rows[0]],
                temperature=1.0,
                generator=generator,
            )
            for place, row in enumerate(rows):
                answers[row] = said[copies * place : copies * (place + 1)]
    return ground.public.candidates(places, answers)


def _alike(ends: Sequence[set[int]], size: int) -> list[list[int]]:
    """Questions whose answers end alike, so many at once."""
    rows: dict[frozenset[int], list[int]] = {}
    for row, own in enumerate(ends):
        rows.setdefault(frozenset(own), []).append(row)
    return [own[start : start + size] for own in rows.values() for start in range(0, len(own), size)]
