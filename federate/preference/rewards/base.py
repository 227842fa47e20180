"""What a reward model is: it sees a picture, a question and an answer, and says how good the answer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.preference.candidates import Asking, Candidates
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component, Options
from fedcmp.pipeline.registry import Registry


@dataclass(frozen=True)
class Setting:
    """What a site has to build a reward model from.

    Attributes:
        asking: How questions and answers become token ids of the policy's LLM.
        model: That LLM, behind a projector with the reference's weights.
        architecture: The reference's projector.
        d_vision: Width of a feature.
        generator: For initial weights, on the CPU.
    """

    asking: Asking
    model: VisionLanguage
    architecture: Component
    d_vision: int
    generator: torch.Generator

    def own(self, projector: Component | None) -> VisionLanguage:
        """A projector of one's own before the LLM: from the reference where it is of that architecture."""
        from fedcmp.pipeline.models import projector as projectors

        model = self.model.copied()
        if projector is None or projectors.architecture_of(projector) == model.projector.architecture:
            return model
        return self.fresh(projector, model)

    def fresh(self, projector: Component, before: VisionLanguage) -> VisionLanguage:
        """A projector with initial weights before an LLM."""
        from fedcmp.pipeline.models import projector as projectors

        made = projectors.build(projector, d_vision=self.d_vision, d_llm=before.language.d_llm)
        projectors.initialise(made, self.generator)
        made.begin()
        return VisionLanguage(made.to(before.language.device), before.language)


class Judge(nn.Module, ABC):
    """A reward model with its weights; the frozen LLM is not among them."""

    @abstractmethod
    def forward(self, candidates: Candidates) -> Tensor:
        """Rewards `(answers,)` float32."""

    def state(self) -> State:
        """A copy of the weights on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put weights in place."""
        self.load_state_dict(dict(state))


class Reward(Options, ABC):
    """A kind of reward model, and how it is fitted: AdamW on -log σ(r⁺ - r⁻) + `decay` · r², cosine.

    `batch_size` counts pairs.
    """

    epochs: int = Field(3, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    decay: float = Field(0.0, ge=0)

    def files(self) -> dict[str, str]:
        """SHA-256 of files that decide its rewards besides its options."""
        return {}

    @abstractmethod
    def judge(self, setting: Setting) -> Judge:
        """The model with initial weights, on the LLM's device."""


REWARDS: Registry[Reward] = Registry("reward model", "fedcmp.federate.preference.rewards")
