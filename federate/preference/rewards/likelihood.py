"""An answer is as good as it is likely to a language model whose projector was fitted to preferences."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from fedcmp.federate.preference.rewards import REWARDS, Asking, Candidates, Judge, Reward, Setting, log_probs
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component


@REWARDS.register("likelihood")
class Likelihood(Reward):
    """r(x, y) = s Σ_t log p_ψ(y_t | v, q, y_<t) / p_ref(y_t | v, q, y_<t), with a projector ψ of its own.

    What the reference finds likely anyway, short answers above all, is not the better for it; without the
    reference (`relative = false`) it is. With it, fitting is DPO (Rafailov et al., 2023, arXiv 2305.18290).

    Args:
        projector: Architecture of ψ; it starts from the reference where it is that one's.
        language: Folder of another LLM; by default the policy's.
        relative: Whether the reference's likelihood is taken off; the policy's LLM has one alone.
        mean: The mean of log p over tokens instead of their sum.
        scale: s in the beginning; it is fitted, too.
    """

    projector: Component | None = None
    language: Path | None = None
    relative: bool = True
    mean: bool = False
    scale: float = Field(0.1, gt=0)

    def judge(self, setting: Setting) -> Judge:
        """The projector and s."""
        if self.language is None:
            reference = setting.model if self.relative else None
            return _Likely(setting.own(self.projector), self.scale, self.mean, reference)
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
    def __init__(
        self, model: VisionLanguage, scale: float, mean: bool, reference: VisionLanguage | None = None
    ) -> None:
        super().__init__()
        self._model, self._mean = model, mean
        # In a list it is no part of the model.
        self._reference = [] if reference is None else [reference]
        self.projector = model.projector
        self.scale = nn.Parameter(torch.tensor(scale, device=model.language.device))

    def forward(self, candidates: Candidates) -> Tensor:
        visual = self._model.visual(candidates.features)
        values, rows = log_probs(self._model, candidates, visual)
        for reference in self._reference:
            with torch.no_grad():
                expected, _ = log_probs(reference, candidates, reference.visual(candidates.features))
            values = values - expected
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
        read = self._own.answers(candidates.texts, self._theirs.said(candidates))
        own = Candidates(
            candidates.features,
            candidates.owners,
            candidates.texts,
            [prompt for prompt, _ in read],
            [answer for _, answer in read],
        )
        return super().forward(own)
