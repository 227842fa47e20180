"""A small network on what the frozen LLM makes of an answer."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from fedcmp.federate.preference.candidates import hidden_states
from fedcmp.federate.preference.rewards import REWARDS, Candidates, Judge, Reward, Setting
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component


@REWARDS.register("head")
class Head(Reward):
    """r(x, y) of the mean last hidden state of the answer, by an MLP, with a projector of its own.

    Args:
        projector: Its architecture; it starts from the reference where it is that one's.
        width: Of the MLP's hidden layer.
    """

    decay: float = Field(1e-3, ge=0)
    projector: Component | None = None
    width: int = Field(64, ge=1)

    def judge(self, setting: Setting) -> Judge:
        """The projector and the MLP."""
        model = setting.own(self.projector)
        d_llm = model.language.d_llm
        mlp = nn.Sequential(
            nn.LayerNorm(d_llm), nn.Linear(d_llm, self.width), nn.GELU(), nn.Linear(self.width, 1)
        )
        projectors.initialise(mlp, setting.generator)
        return _Head(model, mlp.to(model.language.device))


class _Head(Judge):
    def __init__(self, model: VisionLanguage, mlp: nn.Module) -> None:
        super().__init__()
        self._model, self.projector, self.mlp = model, model.projector, mlp

    def forward(self, candidates: Candidates) -> Tensor:
        states, rows = hidden_states(self._model, candidates, self._model.visual(candidates.features))
        sums = states.new_zeros(len(candidates), states.shape[1]).index_add(0, rows, states)
        means = sums / rows.bincount(minlength=len(candidates)).clamp(min=1)[:, None]
        rewards: Tensor = self.mlp(means).squeeze(1)
        return rewards
