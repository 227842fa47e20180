"""One alignment: a finished run and preferences in, an ordinary run folder out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.engines.base import SiloCard
from fedcmp.federate.finish import damaged, finish
from fedcmp.federate.preference.engine import Court, LocalCourt
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.grpo import advantages
from fedcmp.federate.preference.jury import Jury
from fedcmp.federate.preference.mixture import deviations, fused, weights
from fedcmp.federate.preference.policy import Policy, sample
from fedcmp.federate.preference.rewards import REWARDS
from fedcmp.federate.preference.routers import ROUTERS, Router
from fedcmp.pipeline import history
from fedcmp.pipeline.align import Align
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress, say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import atomic, locked, write_atomic
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import run_differences, run_identity
from fedcmp.pipeline.manifest import withdraw_manifest
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.run_folder import Run

SAMPLED = "sampled.jsonl"
_SHOWN = 3
_BEFORE, _CALIBRATION, _TRAINING = range(3)


def align(experiment: Experiment, court: Callable[[Experiment, Ground], Court] = LocalCourt) -> Run:
    """Align a projector, go on with it, or find it done.

    Args:
        experiment: The experiment, with `align`.
        court: Makes what reaches the silos; they are all in this process by default.

    Returns:
        The finished run.

    Raises:
        UserError: The experiment has no `align`, or something that it names is missing or does not fit.
    """
    _refuse(experiment)
    out = experiment.run_path
    with locked(out / ".lock", str(out)):
        ground = Ground(experiment)
        with court(experiment, ground) as sites:
            cards = sites.cards()
            assert experiment.align is not None
            wanted = run_identity(experiment, next(iter(cards.values())).language) | {
                "caches": {name: cards[name].content for name in experiment.federate.silos},
                "prompts": ground.public.contents,
            }
            made = Run.find(out, experiment.federate.projector.plugins)
            if made is not None:
                changed = run_differences(wanted, made.identity) or damaged(made)
                if not changed:
                    say(f"{out}: nothing to do, this run is what the configuration asks for")
                    return made
                say(f"{out}: training again, because {'; '.join(changed)}")
            withdraw_manifest(out)
            jury = Jury(ground, experiment.federate.silos, sites.ask)
            made = _aligned(experiment, ground, jury, cards, wanted)
    say(f"Projector, history and sampled answers in {out}")
    return made


def _refuse(experiment: Experiment) -> None:
    align, options = experiment.align, experiment.federate
    if align is None:
        raise UserError("this experiment has no [align]; add it, or use 'fedcmp federate' (docs/mor.md)")
    strangers = sorted(set(align.rewards) - set(options.silos))
    if strangers:
        raise UserError(f"align.rewards names {', '.join(strangers)}, none of federate.silos; remove them")
    judged = sorted(set(align.prompts) & set(options.silos))
    if judged:
        raise UserError(f"align.prompts: {', '.join(judged)} are silos that judge; prompts have to be public")
    for name, used in (
        ("privacy", options.privacy is not None),
        ("communication", options.communication is not None),
        ("poison", options.poison is not None),
        ("shard", options.shard),
    ):
        if used:
            raise UserError(f"federate.{name}: not in an alignment, which sends no updates; remove it")


@dataclass
class _Progress:
    """All that an alignment carries from generation to generation; a checkpoint is just this.

    Attributes:
        state: The policy.
        safe: The policy whose answers were last seen within the limit of KL.
        step: Steps taken.
        optimizer: Its moments.
        omega: The router's Ω; none before it is fitted.
        deviations: The rewards' σ.
        contents: The reward models, as their sites name them.
        kinds: Kinds of prompts that are trained on.
        agreement: Share of public preferences of each kind that the mixture agrees with, None without any.
        stopped: Whether the limit of KL was exceeded.
    """

    state: State
    safe: State
    step: int = 0
    optimizer: dict[str, Any] | None = None
    omega: Tensor | None = None
    deviations: Tensor | None = None
    contents: dict[str, str] = field(default_factory=dict)
    kinds: list[int] = field(default_factory=list)
    agreement: dict[str, float | None] = field(default_factory=dict)
    stopped: bool = False

    def save(self, path: Path, print_of_run: str) -> None:
        """Write it atomically."""
        with atomic(path) as file:
            torch.save({"fingerprint": print_of_run, **vars(self)}, file)

    @classmethod
    def load(cls, path: Path, print_of_run: str) -> _Progress | None:
        """Read it, or None where there is none of this configuration.

        Raises:
            UserError: The file is no checkpoint.
        """
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, weights_only=True)
            ours = saved.pop("fingerprint") == print_of_run
            return cls(**saved) if ours else None
        except Exception:
            raise UserError(f"{path}: damaged, not a checkpoint; delete it to train from the start") from None


def _aligned(
    experiment: Experiment, ground: Ground, jury: Jury, cards: Mapping[str, SiloCard], wanted: dict[str, Any]
) -> Run:
    align, out = experiment.align, experiment.run_path
    assert align is not None
    path, print_of_run = out / "checkpoint.pt", fingerprint(wanted)
    done = _Progress.load(path, print_of_run)
    if done is None:
        done = _Progress(dict(ground.reference), dict(ground.reference))
    elif done.step:
        say(f"{out}: continuing after step {done.step}")
    history.truncate(out / history.HISTORY, done.step)
    if align.method == "grpo":
        _grpo(experiment, ground, jury, done, lambda: done.save(path, print_of_run))
    else:
        _averaged(experiment, jury, done, lambda: done.save(path, print_of_run))
    _write_sampled(experiment, ground, done.state)
    facts = {
        "method": align.method,
        "accuracies": jury.accuracies,
        "agreement": done.agreement,
        "kinds": [ground.public.kinds[kind] for kind in done.kinds],
        "stopped": done.stopped,
    }
    counts = {name: {"samples": card.samples, "left_out": card.left_out} for name, card in cards.items()}
    made = finish(
        experiment,
        f"mor_{align.method}" if align.method == "grpo" else f"fed_{align.method}",
        wanted,
        {"projector.safetensors": done.state},
        ground.model.projector.architecture,
        next(iter(cards.values())),
        counts,
        {"align": facts},
    )
    path.unlink(missing_ok=True)
    return made


def _grpo(
    experiment: Experiment, ground: Ground, jury: Jury, done: _Progress, checkpoint: Callable[[], None]
) -> None:
    align, out = experiment.align, experiment.run_path
    assert align is not None
    router = ROUTERS.build(align.router, "align.router")
    epochs = {c: REWARDS.build(align.reward_of(c), f"align.rewards.{c}").epochs for c in jury.clients}
    jury.fit(experiment, epochs)
    policy = Policy(ground, experiment)
    policy.model.load(done.state)
    if done.optimizer is not None:
        policy.optimizer.load_state_dict(done.optimizer)
    if done.omega is None or done.contents != jury.contents:
        if done.omega is not None:
            raise UserError(
                f"{out}: the silos have other reward models than it began with; remove {out} to begin anew"
            )
        _prepare(align, ground, jury, policy, router, done)
        checkpoint()
    assert done.omega is not None and done.deviations is not None
    jury.deviations = done.deviations
    at_once = align.prompts_per_step * align.steps_per_generation
    with progress(experiment.run, align.steps - done.step, "steps") as task:
        while done.step < align.steps and not done.stopped:
            first = done.step // align.steps_per_generation
            places = _questions(ground, done.kinds, first * at_once, at_once, experiment.seed)
            generation = policy.generate(places, [_TRAINING, first])
            if generation.kl > align.kl_limit:
                done.state, done.stopped = done.safe, True
                say(
                    f"step {done.step}: KL {generation.kl:.2f} is above align.kl_limit = {align.kl_limit:g}; the "
                    "run ends with the last weights that were within it (a higher align.beta keeps them there)"
                )
                checkpoint()
                break
            done.safe = policy.state()
            rewards = jury.scores(places, generation.answers)
            h = ground.context(generation.candidates)
            pi = weights(done.omega, h, uniform=router.uniform, temperature=router.temperature)
            mixed = fused(pi, rewards).view(len(places), -1)
            advantage = advantages(mixed).flatten()
            rows = []
            steps = min(align.steps_per_generation, align.steps - done.step)
            for number in range(steps):
                chosen = range(number * align.prompts_per_step, (number + 1) * align.prompts_per_step)
                moved = policy.step(done.step + number, generation, chosen, advantage)
                answers = range(chosen.start * mixed.shape[1], chosen.stop * mixed.shape[1])
                rows += _rows(
                    done.step + number, jury.clients, moved, generation, mixed[chosen], pi[answers], answers
                )
                task.advance()
            history.append(out / history.HISTORY, rows)
            task.note(f"reward {mixed.mean():.3f}, KL {generation.kl:.3f}")
            done.step += steps
            done.state, done.optimizer = policy.state(), policy.optimizer.state_dict()
            checkpoint()
    _summary(experiment.run, jury, done, history.read(out / history.HISTORY))


def _prepare(
    align: Align, ground: Ground, jury: Jury, policy: Policy, router: Router, done: _Progress
) -> None:
    """Bring rewards to one scale, fit the router, and see which kinds of prompts the mixture can judge."""
    public = ground.public
    kinds = list(range(len(public.kinds)))
    places = _questions(ground, kinds, 0, align.calibration * len(kinds), -1)
    answers = policy.sample(places, [_CALIBRATION], align.num_generations)
    flat = list(answers.answers)
    several = [flat[at : at + align.num_generations] for at in range(0, len(flat), align.num_generations)]
    raw = jury.scores(places, several)
    done.deviations = jury.deviations = deviations(raw.view(len(raw), len(places), -1))
    done.omega, done.contents = router.fit(jury), dict(jury.contents)
    done.agreement = _agreement(ground, jury, router, done.omega)
    done.kinds = [
        kind
        for kind, name in enumerate(public.kinds)
        if (share := done.agreement[name]) is None or share > align.least
    ]
    for kind, name in enumerate(public.kinds):
        share = done.agreement[name]
        told = (
            "no public preferences to check them by"
            if share is None
            else f"they agree with {share:.1%} of them"
        )
        left = "" if kind in done.kinds else f", not above align.least = {align.least:g}: left out"
        say(f"{name}: rewards and public preferences: {told}{left}")
    if not done.kinds:
        raise UserError(
            "align.least: the mixture of rewards agrees with too few public preferences of every kind of prompt, so "
            "that training would follow its mistakes; collect more preferences, on the reference's own answers"
        )


def _agreement(ground: Ground, jury: Jury, router: Router, omega: Tensor) -> dict[str, float | None]:
    """Share of public preferences of each kind that the mixture agrees with."""
    h, margins = jury.margins()
    pi = weights(omega, h, uniform=router.uniform, temperature=router.temperature)
    right = fused(pi, margins) > 0
    shares: dict[str, float | None] = {}
    before = 0
    for name, pairs in ground.public.pairs.items():
        own = right[before : before + len(pairs)]
        shares[name] = float(own.float().mean()) if len(pairs) else None
        before += len(pairs)
    return shares


def _questions(ground: Ground, kinds: list[int], first: int, number: int, seed: int) -> np.ndarray:
    """`(number, 2)` int64 of (kind, number): the questions from the first on, kind by kind in turn."""
    places = []
    for place in range(first, first + number):
        kind = kinds[place % len(kinds)]
        of_kind = place // len(kinds)
        pass_, at = divmod(of_kind, ground.public.sizes[kind])
        places.append((kind, int(ground.public.order(kind, seed + 1, pass_)[at])))
    return np.array(places, np.int64)


def _rows(
    step: int,
    clients: tuple[str, ...],
    moved: Any,
    generation: Any,
    rewards: Tensor,
    pi: Tensor,
    answers: range,
) -> list[dict[str, Any]]:
    """A step in the history, and how much every client counted in it."""
    lengths = [len(generation.candidates.answers[answer]) for answer in answers]
    whole = {
        "round": step,
        "client": None,
        "loss": moved.loss,
        "reward": float(rewards.mean()),
        "reward_deviation": float(rewards.std(1).mean()),
        "kl": moved.kl,
        "clipped": moved.clipped,
        "length": sum(lengths) / len(lengths),
    }
    judged = [
        {
            "round": step,
            "client": client,
            "loss": None,
            "samples": len(lengths),
            "seconds": None,
            "weight": weight,
        }
        for client, weight in zip(clients, pi.mean(0).tolist(), strict=True)
    ]
    return [whole, *judged]


def _averaged(experiment: Experiment, jury: Jury, done: _Progress, checkpoint: Callable[[], None]) -> None:
    """FedDPO, or learning what was chosen: rounds of FedAvg."""
    rounds, out = experiment.federate.rounds, experiment.run_path
    with progress(experiment.run, rounds - done.step, "rounds") as task:
        while done.step < rounds:
            states, losses = jury.tuned(done.state, done.step)
            total = sum(jury.samples.values())
            done.state = {
                name: torch.stack([states[c][name] * (jury.samples[c] / total) for c in jury.clients]).sum(0)
                for name in done.state
            }
            rows = [
                {
                    "round": done.step,
                    "client": c,
                    "loss": losses[c],
                    "samples": jury.samples[c],
                    "seconds": None,
                }
                for c in jury.clients
            ]
            history.append(out / history.HISTORY, [{"round": done.step, "client": None}, *rows])
            task.advance()
            task.note(f"loss {sum(losses.values()) / len(losses):.3f}")
            done.step += 1
            checkpoint()


def _write_sampled(experiment: Experiment, ground: Ground, state: State) -> None:
    """Answers to a few questions of each kind before and after, drawn with the same random numbers."""
    align = experiment.align
    assert align is not None
    kinds = list(range(len(ground.public.kinds)))
    places = _questions(ground, kinds, 0, _SHOWN * len(kinds), experiment.seed + 1)
    after = ground.model.copied()

    def told(model: VisionLanguage) -> list[str]:
        seed, at_once = [experiment.seed, _BEFORE], experiment.federate.batch_size
        return ground.asking.said(sample(model, ground, places, seed, 1, align.max_new_tokens, at_once))

    with ground.as_reference():
        before = told(ground.model)
        after.load(state)
        now = told(after)
    asked = ground.public.candidates(places, [[[]]] * len(places)).texts
    lines = [
        {
            "kind": ground.public.kinds[kind],
            "asked": [turn.content for turn in text.turns[:-1]],
            "before": one,
            "after": other,
        }
        for (kind, _), text, one, other in zip(places.tolist(), asked, before, now, strict=True)
    ]
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(experiment.run_path / SAMPLED, data.encode())


def _summary(name: str, jury: Jury, done: _Progress, rows: list[dict[str, Any]]) -> None:
    whole = [row for row in rows if row["client"] is None]
    if not whole:
        return
    some = max(len(whole) // 10, 1)

    def mean(key: str, part: list[dict[str, Any]]) -> str:
        return f"{sum(row[key] for row in part) / len(part):.3f}"

    keys = ("reward", "kl", "clipped", "length")
    table(
        f"Alignment {name}: {done.step} steps, means of the first and the last {some}",
        ["steps", "reward", "KL", "clipped", "tokens"],
        [
            [label, *(mean(key, part) for key in keys)]
            for label, part in (("first", whole[:some]), ("last", whole[-some:]))
        ],
    )
    body = []
    for client in jury.clients:
        own = [row["weight"] for row in rows if row["client"] == client]
        share = jury.accuracies[client]
        ranked = "-" if share is None else f"{share:.1%}"
        body.append([client, f"{jury.samples[client]:,}", ranked, f"{sum(own) / len(own):.2f}"])
    table("Reward models", ["silo", "preferences", "right on held-out ones", "weight"], body)
