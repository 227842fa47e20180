"""An answer is as good as it is likely to a language model whose projector was fitted to preferences."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from fedcmp.federate.preference.rewards import REWARDS, Asking, Candidates, Judge, Reward, Setting, log_probs
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.saved_model import LANGUAGE_FILES, model_hashes
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.records import IMAGE_PLACEHOLDER


@REWARDS.register("likelihood")
class Likelihood(Reward):
    """r(x, y) = s Σ_t log p_ψ(y_t | v, q, y_<t), with a projector ψ of its own before the frozen LLM.

    Args:
        projector: Architecture of ψ; it starts from the reference where it is that one's.
        language: Folder of another LLM; by default the policy's.
        mean: The mean of log p over tokens instead of their sum.
        scale: s in the beginning; it is fitted, too.
    """

    projector: Component | None = None
    language: Path | None = None
    mean: bool = False
    scale: float = Field(0.1, gt=0)

    def files(self) -> dict[str, str]:
        """Those of another LLM."""
        return {} if self.language is None else model_hashes(self.language, LANGUAGE_FILES)

    def judge(self, setting: Setting) -> Judge:
        """The projector and s."""
        if self.language is None:
            return _Likely(setting.own(self.projector), self.scale, self.mean)
        asking = setting.asking
        other = FrozenLanguageModel(self.language, dtype="float32", device=str(asking.language.device))
        own = Asking(
            other,
            asking.template,
            asking.question_template,
            other.at_most(asking.max_length),
            asking.visual_tokens,
        )
        model = setting.fresh(
            self.projector or setting.architecture, VisionLanguage(setting.model.projector, other)
        )
        return _Translated(model, self.scale, self.mean, asking, own)


class _Likely(Judge):
    def __init__(self, model: VisionLanguage, scale: float, mean: bool) -> None:
        super().__init__()
        self._model, self._mean = model, mean
        self.projector = model.projector
        self.scale = nn.Parameter(torch.tensor(scale, device=model.language.device))

    def forward(self, candidates: Candidates) -> Tensor:
        visual = self._model.visual(candidates.features)
        values, rows = log_probs(self._model, candidates, visual)
        sums = values.new_zeros(len(candidates)).index_add(0, rows, values)
        if self._mean:
            sums = sums / rows.bincount(minlength=len(candidates)).clamp(min=1)
        return self.scale * sums


class _Translated(_Likely):
    """With an LLM that has tokens of its own."""

    def __init__(self, model: VisionLanguage, scale: float, mean: bool, theirs: Asking, own: Asking) -> None:
        super().__init__(model, scale, mean)
        self._theirs, self._own = theirs, own

    def forward(self, candidates: Candidates) -> Tensor:
        said = [answer.replace(IMAGE_PLACEHOLDER, "") for answer in self._theirs.said(candidates)]
        read = self._own.answers(candidates.texts, said)
        own = Candidates(
            candidates.features,
            candidates.owners,
            candidates.texts,
            [prompt for prompt, _ in read],
            [answer for _, answer in read],
        )
        return super().forward(own)
