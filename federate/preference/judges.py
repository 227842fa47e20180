"""The silos of one machine with their preferences and reward models: what a site does in an alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedcmp.federate.client.texts import Counts
from fedcmp.federate.preference.candidates import Candidates
from fedcmp.federate.preference.fit import accuracy, fit
from fedcmp.federate.preference.ground import Ground
from fedcmp.federate.preference.mixture import domain_gradient
from fedcmp.federate.preference.pairs import Pairs, read_pairs
from fedcmp.federate.preference.public import as_lists
from fedcmp.federate.preference.rewards import REWARDS, Judge, Reward, Setting
from fedcmp.federate.preference.routers import ROUTERS
from fedcmp.federate.preference.tune import tune
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import progress, say
from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.files import read_json, write_atomic, write_json
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import language_identity
from fedcmp.pipeline.manifest import provenance
from fedcmp.pipeline.models.projector import content_hash

REWARD_FOLDER = "rewards"


@dataclass
class _Silo:
    """A silo's preferences, and its reward model once that is fitted."""

    name: str
    number: int
    pairs: Pairs
    held_out: Pairs
    left_out: list[int]
    cache: FeatureCache
    options: Reward
    judge: Judge | None = None
    content: str = ""
    context: Tensor | None = None


class Judges:
    """Answers what a server asks of silos; their reward models and preferences stay here.

    Args:
        experiment: The experiment.
        caches: Caches of the silos here.
        ground: What the server has, too.

    Raises:
        UserError: A silo has no preferences.

    Attributes:
        counts: Preferences that are trained on and that are left out, by silo.
    """

    def __init__(self, experiment: Experiment, caches: Mapping[str, FeatureCache], ground: Ground) -> None:
        assert experiment.align is not None
        self._experiment, self._align, self._ground = experiment, experiment.align, ground
        self._at_once = experiment.federate.micro_batch or experiment.federate.batch_size
        self._router = ROUTERS.build(self._align.router, "align.router")
        self._silos = {}
        for name, cache in caches.items():
            whole, reasons = read_pairs(cache, ground.asking)
            pairs, held_out = whole.divided(self._align.hold_out)
            if not len(pairs):
                raise UserError(
                    f"silo {name} has no preferences to train on (texts with 'chosen' and 'rejected'): "
                    f"{len(held_out)} are held out by align.hold_out = {self._align.hold_out}, "
                    f"{len(reasons)} cannot be used; remove it from federate.silos, or extract more"
                )
            for reason in list(reasons.values())[:1]:
                say(
                    f"{name}: {len(reasons)} preferences cannot be used and are left out; the first: {reason}"
                )
            options = REWARDS.build(self._align.reward_of(name), f"align.rewards.{name}")
            number = experiment.federate.silos.index(name)
            self._silos[name] = _Silo(name, number, pairs, held_out, sorted(reasons), cache, options)

    @property
    def counts(self) -> dict[str, Counts]:
        """Preferences by silo."""
        return {name: Counts(len(silo.pairs), len(silo.left_out)) for name, silo in self._silos.items()}

    @property
    def d_llm(self) -> int:
        """Width of the LLM's embeddings."""
        return self._ground.language.d_llm

    @property
    def adapter(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's matrices by name."""
        return {name: tuple(matrix.shape) for name, matrix in self._ground.language.adapter.items()}

    def __call__(self, name: str, step: Mapping[str, Any]) -> dict[str, Any]:
        """Take a step for a silo.

        Raises:
            UserError: The server has another reference, or asks for something that was not agreed to.
            ValueError: The step is none.
        """
        silo = self._silos[name]
        if step.get("ground") != self._ground.content:
            raise UserError(
                f"site '{name}' has another reference or other prompts than the server; give both the same "
                "federate.initial and the same caches of align.prompts"
            )
        if self._align.method != "grpo":
            steps = {"tune": self._tune}
        else:
            steps = {"fit": self._fit, "score": self._score, "margins": self._margins}
            steps |= {"gradient": self._gradient} if self._router.wants_gradients else {}
        if step.get("step") not in steps:
            raise ValueError(f"no step '{str(step.get('step'))[:40]}' in this alignment")
        with self._ground.as_reference():
            return steps[step["step"]](silo, step)

    def _fit(self, silo: _Silo, step: Mapping[str, Any]) -> dict[str, Any]:
        """Fit the reward model, or find it fitted; only one that is averaged begins elsewhere and leaves."""
        average, start = self._align.average, step.get("start")
        first, last = step.get("epochs") or (0, silo.options.epochs)
        if not average and (start is not None or "epochs" in step):
            raise ValueError("reward models of this alignment are not averaged")
        if not 0 <= first <= last <= silo.options.epochs:
            raise ValueError(f"epochs {str((first, last))[:40]} are none of its {silo.options.epochs}")
        silo.judge = silo.options.judge(self._setting(silo))
        if start is not None:
            _load(silo.judge, start)
        identity = self._identity(silo, start, (first, last))
        path = self._experiment.build / REWARD_FOLDER / f"{identity}.safetensors"
        known = _recalled(path)
        if known is None:
            self._train(silo, range(first, last))
            share = accuracy(silo.judge, silo.held_out, silo.options.batch_size)
            write_atomic(path, data := save(silo.judge.state()))
            known = {"silo": silo.name, "accuracy": share, "bytes": sha256(data).hexdigest()}
            write_json(path.with_suffix(".json"), known | {"made_by": self._made_by()})
        else:
            _load(silo.judge, load_file(path))
        silo.content = fingerprint([identity, content_hash(silo.judge.state())])
        answer = {
            "content": silo.content,
            "accuracy": known["accuracy"],
            "pairs": len(silo.pairs),
            "left_out": len(silo.left_out),
        }
        return answer | ({"state": silo.judge.state()} if average else {})

    def _train(self, silo: _Silo, epochs: range) -> None:
        assert silo.judge is not None
        steps = len(epochs) * -(-len(silo.pairs) // silo.options.batch_size)
        seed = [self._experiment.seed, silo.number]
        with progress(f"reward model of {silo.name}", steps, "steps") as task:
            fit(silo.judge, silo.options, silo.pairs, seed=seed, epochs=epochs, advance=task.advance)

    def _setting(self, silo: _Silo) -> Setting:
        # Reward models that are averaged begin alike.
        seed = self._experiment.seed * 1000 + (0 if self._align.average else 1 + silo.number)
        return Setting(
            self._ground.asking,
            self._ground.model,
            self._experiment.federate.projector,
            self._ground.d_vision,
            torch.Generator().manual_seed(seed),
        )

    def _identity(self, silo: _Silo, start: Mapping[str, Tensor] | None, epochs: tuple[int, int]) -> str:
        return fingerprint(
            [
                self._align.reward_of(silo.name).as_built(),
                silo.options.files(),
                self._experiment.federate.projector.as_built(),
                content_hash(self._ground.reference),
                bool(self._align.average),
                silo.cache.content,
                silo.left_out,
                self._align.hold_out,
                self._ground.content,
                language_identity(self._experiment),
                [self._ground.asking.template, self._ground.asking.question_template],
                [self._ground.asking.max_length, self._experiment.seed, silo.number, list(epochs)],
                None if start is None else content_hash(start),
                self._made_by()["packages"],
            ]
        )

    def _made_by(self) -> dict[str, Any]:
        return provenance(str(self._ground.language.device))

    def _fitted(self, silo: _Silo, step: Mapping[str, Any]) -> Judge:
        if silo.judge is None or step.get("content") != silo.content:
            raise ValueError("that is not the reward model that was fitted here; fit it again")
        return silo.judge

    @torch.no_grad()
    def _score(self, silo: _Silo, step: Mapping[str, Any]) -> dict[str, Any]:
        judge = self._fitted(silo, step)
        places, answers = as_lists(step)
        return {"rewards": self._judged(judge, self._ground.public.candidates(places, answers))}

    @torch.no_grad()
    def _margins(self, silo: _Silo, step: Mapping[str, Any]) -> dict[str, Any]:
        judge = self._fitted(silo, step)
        rewards = [torch.zeros(0, 2)]
        for pairs in self._ground.public.pairs.values():
            for start in range(0, len(pairs), self._at_once):
                some = pairs.candidates(range(start, min(start + self._at_once, len(pairs))))
                rewards.append(self._judged(judge, some).view(-1, 2))
        return {"rewards": torch.cat(rewards)}

    def _judged(self, judge: Judge, candidates: Candidates) -> Tensor:
        rewards = torch.empty(len(candidates))
        for rows in candidates.by_length(self._at_once):
            rewards[rows] = judge(candidates.part(rows)).float().cpu()
        return rewards

    def _gradient(self, silo: _Silo, step: Mapping[str, Any]) -> dict[str, Any]:
        if silo.context is None:
            parts = []
            for start in range(0, len(silo.pairs), self._at_once):
                places = range(start, min(start + self._at_once, len(silo.pairs)))
                some = silo.pairs.candidates(places)
                parts.append(self._ground.context(some.part(range(0, len(some), 2))))
            silo.context = torch.cat(parts)
        omega, wanted = step.get("omega"), (len(self._experiment.federate.silos), self._ground.width)
        if not isinstance(omega, Tensor) or tuple(omega.shape) != wanted or omega.dtype != torch.float32:
            raise ValueError(f"no float32 matrix of shape {wanted}")
        gradient, loss = domain_gradient(omega, silo.context, silo.number)
        return {"gradient": gradient, "loss": float(loss), "samples": len(silo.context)}

    def _tune(self, silo: _Silo, step: Mapping[str, Any]) -> dict[str, Any]:
        state, loss = tune(
            self._ground, silo.pairs, self._experiment, step["state"], step["round"], [silo.number]
        )
        return {"state": state, "loss": loss, "samples": len(silo.pairs)}


def _load(judge: Judge, state: Mapping[str, Tensor]) -> None:
    """Put weights in place.

    Raises:
        ValueError: They are of another form.
    """
    try:
        judge.load(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"not the weights of this reward model: {one_line(error)}") from None


def _recalled(path: Path) -> dict[str, Any] | None:
    """What is known of a fitted reward model, where its file is whole."""
    known = read_json(path.with_suffix(".json"))
    if not isinstance(known, dict) or not path.is_file():
        return None
    return known if sha256(path.read_bytes()).hexdigest() == known.get("bytes") else None
