"""GRPO at the server, judged by the mixture of the silos' reward models."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch

from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.grpo import advantages
from fedcmp.federate.preference.jury import Jury
from fedcmp.federate.preference.mixture import centred, deviations, fused, weights
from fedcmp.federate.preference.policy import Policy
from fedcmp.federate.preference.progress import Progress
from fedcmp.federate.preference.record import step_rows
from fedcmp.federate.preference.rewards import REWARDS
from fedcmp.federate.preference.routers import ROUTERS, Router
from fedcmp.pipeline import history
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress, say
from fedcmp.pipeline.errors import DivergedError, UserError

_CALIBRATION, _TRAINING, _LAST = range(3)


def train(
    experiment: Experiment, ground: Ground, jury: Jury, done: Progress, save: Callable[[], None]
) -> None:
    """Fit the reward models, prepare the mixture, and move the policy step by step; `done` is changed.

    Args:
        experiment: The experiment.
        ground: The LLM, the reference and the prompts.
        jury: The reward models.
        done: Where to go on.
        save: Writes a checkpoint of it.

    Raises:
        UserError: The mixture can judge no kind of prompt, or a site has another reward model than before.
    """
    align, rows = experiment.align, experiment.run_path / history.HISTORY
    assert align is not None
    if not align.steps:
        return
    router = ROUTERS.build(align.router, "align.router")
    rewards = {c: REWARDS.build(align.reward_of(c), f"align.rewards.{c}") for c in jury.clients}
    epochs = {client: reward.epochs for client, reward in rewards.items()}
    jury.fit(align.average, epochs)
    policy = Policy(ground, experiment)
    policy.model.load(done.state)
    if done.optimizer is not None:
        policy.optimizer.load_state_dict(done.optimizer)
    if done.omega is None:
        _prepare(experiment, ground, jury, policy, router, done)
        save()
    elif done.contents != jury.contents:
        out = experiment.run_path
        raise UserError(f"{out}: silos have other reward models than it began with; remove it to begin anew")
    assert done.deviations is not None
    jury.deviations = done.deviations
    with progress(experiment.run, align.steps - done.step, "steps") as task:
        while done.step < align.steps and not done.stopped:
            told = _generation(experiment, ground, jury, policy, router, done)
            history.append(rows, told)
            steps = [row for row in told if row["client"] is None]
            task.advance(len(steps))
            task.note("".join(f"reward {row['reward']:.3f}, KL {row['kl']:.3f}" for row in steps[-1:]))
            save()
    if not done.stopped:
        places = ground.public.questions(done.kinds, 0, align.prompts_per_step, experiment.seed + 2)
        kl = policy.generate(places, [_LAST]).kl
        if not kl <= align.kl_limit:
            _stop(align.kl_limit, kl, done)
    if done.stopped:
        history.truncate(rows, done.step)
        save()


def _stop(limit: float, kl: float, done: Progress) -> None:
    """Go back to the last weights within the limit."""
    say(
        f"step {done.step}: KL {kl:.2f} is above align.kl_limit = {limit:g}; the run ends with the weights "
        f"of step {done.safe_step}, the last within it (a higher align.beta or a lower align.learning_rate "
        "keeps them there)"
    )
    done.state, done.step, done.stopped = done.safe, done.safe_step, True


def _generation(
    experiment: Experiment, ground: Ground, jury: Jury, policy: Policy, router: Router, done: Progress
) -> list[dict[str, Any]]:
    """Sample answers, have them judged, and take the steps that they are for; rows of the history."""
    align = experiment.align
    assert align is not None
    assert done.omega is not None
    count, first = align.prompts_per_step, done.step // align.steps_per_generation
    number = count * align.steps_per_generation
    places = ground.public.questions(done.kinds, first * number, number, experiment.seed)
    generation = policy.generate(places, [_TRAINING, first])
    if not generation.kl <= align.kl_limit:
        _stop(align.kl_limit, generation.kl, done)
        return []
    done.safe, done.safe_step, copies = policy.state(), done.step, align.num_generations
    h = ground.context(generation.candidates.part(range(0, len(generation.candidates), copies)))
    pi = weights(done.omega, h, uniform=router.uniform, temperature=router.temperature)
    pi = pi.repeat_interleave(copies, 0)
    rewards = jury.scores(places, generation.answers)
    mixed = fused(pi, rewards).view(number, -1)
    apart = fused(pi, centred(rewards, copies)).view(number, -1)
    advantage = advantages(apart, align.scale_rewards).flatten()
    lengths = [len(answer) for answer in generation.candidates.answers]
    told = []
    for step in range(min(align.steps_per_generation, align.steps - done.step)):
        chosen = range(step * count, (step + 1) * count)
        moved = policy.step(done.step, generation, chosen, advantage)
        if not isfinite(moved.loss):
            rate = f"align.learning_rate ({align.learning_rate:g})"
            raise DivergedError(f"step {done.step}: the loss is {moved.loss}; lower {rate}")
        own = slice(chosen.start * copies, chosen.stop * copies)
        part = mixed[chosen.start : chosen.stop]
        told += step_rows(done.step, jury.clients, moved, part, pi[own], lengths[own])
        done.step += 1
    done.state, done.optimizer = policy.state(), policy.optimizer.state_dict()
    return told


def _prepare(
    experiment: Experiment, ground: Ground, jury: Jury, policy: Policy, router: Router, done: Progress
) -> None:
    """Bring rewards to one scale, fit the router, and see which kinds of prompts the mixture can judge."""
    align, public = experiment.align, ground.public
    assert align is not None
    kinds = list(range(len(public.kinds)))
    places = public.questions(kinds, 0, align.calibration * len(kinds), experiment.seed + 1)
    generation = policy.generate(places, [_CALIBRATION])
    raw = jury.scores(places, generation.answers)
    done.deviations = jury.deviations = deviations(raw.view(len(raw), len(places), -1))
    done.omega, done.contents = router.fit(jury), dict(jury.contents)
    done.agreement = _agreement(ground, jury, router, done.omega)
    for kind, name in enumerate(public.kinds):
        share = done.agreement[name]
        fit = share is None or share > align.least
        done.kinds += [kind] if fit else []
        told = (
            "no public preferences to check the mixture by" if share is None else "preferences ranked right"
        )
        shown = "" if share is None else f"{share:.1%} of {len(public.pairs[name]):,} public "
        say(
            f"{name}: {shown}{told}" + ("" if fit else f", not above align.least = {align.least:g}: left out")
        )
    if not done.kinds:
        raise UserError(
            "align.least: the mixture ranks too few public preferences right in every kind of prompt, and "
            "training would follow its mistakes; collect preferences between the reference's own answers"
        )


def _agreement(ground: Ground, jury: Jury, router: Router, omega: torch.Tensor) -> dict[str, float | None]:
    """Share of the public preferences of each kind that the mixture ranks right."""
    h, margins = jury.margins()
    pi = weights(omega, h, uniform=router.uniform, temperature=router.temperature)
    right = fused(pi, margins) > 0
    sizes = [len(pairs) for pairs in ground.public.pairs.values()]
    return {
        name: float(own.float().mean()) if len(own) else None
        for name, own in zip(ground.public.pairs, right.split(sizes), strict=True)
    }
