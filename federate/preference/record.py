"""What an alignment tells: rows of its history, answers before and after, and a summary."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.jury import Jury
from fedcmp.federate.preference.policy import Moved, sample
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import table
from fedcmp.pipeline.files import write_atomic
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.run_folder import SAMPLED

_SHOWN = 3
# Apart from the seeds of training.
_SEED = 1000


def step_rows(
    step: int, clients: tuple[str, ...], moved: Moved, rewards: Tensor, pi: Tensor, lengths: list[int]
) -> list[dict[str, Any]]:
    """A step in the history, and how much every client counted in it.

    Args:
        step: Its number.
        clients: Who judged.
        moved: What the step did.
        rewards: `(questions, answers)`.
        pi: Weights of each answer's prompt, `(answers, K)`.
        lengths: Tokens of each answer.
    """
    whole = {
        "round": step,
        "client": None,
        "objective": moved.loss,
        "reward": float(rewards.mean()),
        "reward_deviation": float(rewards.std(1).mean()),
        "kl": moved.kl,
        "clipped": moved.clipped,
        "length": sum(lengths) / len(lengths),
    }
    return [whole, *(client_row(step, *each) for each in zip(clients, pi.mean(0).tolist(), strict=True))]


def client_row(step: int, client: str, weight: float) -> dict[str, Any]:
    """How much a client counted in a step."""
    return {"round": step, "client": client, "loss": None, "samples": 0, "seconds": None, "weight": weight}


def write_sampled(experiment: Experiment, ground: Ground, state: State) -> None:
    """Answers to a few questions of each kind before and after, drawn with the same random numbers."""
    align = experiment.align
    assert align is not None
    kinds = list(range(len(ground.public.kinds)))
    places = ground.public.questions(kinds, 0, _SHOWN * len(kinds), experiment.seed + _SEED)
    after = ground.model.copied()

    def told(model: VisionLanguage) -> list[str]:
        seed, at_once = [experiment.seed, _SEED], experiment.federate.batch_size
        return ground.asking.said(sample(model, ground, places, seed, 1, align.max_new_tokens, at_once))

    with ground.as_reference():
        before = told(ground.model)
        after.load(state)
        now = told(after)
    texts = ground.public.candidates(places, [[[]]] * len(places)).texts
    lines = [
        {
            "kind": ground.public.kinds[kind],
            "asked": [turn.content for turn in text.turns[:-1]],
            "before": one,
            "after": other,
        }
        for kind, text, one, other in zip(places[:, 0].tolist(), texts, before, now, strict=True)
    ]
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomic(experiment.run_path / SAMPLED, data.encode())


def summary(name: str, jury: Jury, rows: list[dict[str, Any]]) -> None:
    """Print how rewards and distances went, and how much every silo counted."""
    whole = [row for row in rows if row["client"] is None]
    if not whole:
        return
    some = max(len(whole) // 10, 1)
    body = [
        [
            label,
            *(f"{sum(row[key] for row in part) / some:.3f}" for key in ("reward", "kl", "clipped", "length")),
        ]
        for label, part in (("first", whole[:some]), ("last", whole[-some:]))
    ]
    title = f"Alignment {name}: {len(whole)} steps, means of the first and the last {some}"
    table(title, ["steps", "reward", "KL", "clipped", "tokens"], body)
    judges = []
    for client in jury.clients:
        own = [row["weight"] for row in rows if row["client"] == client]
        share = jury.accuracies[client]
        ranked = "-" if share is None else f"{share:.1%}"
        judges.append([client, f"{jury.samples[client]:,}", ranked, f"{sum(own) / len(own):.2f}"])
    table("Reward models", ["silo", "preferences", "held-out ones ranked right", "weight"], judges)
