"""A bound, not a method: it knows the answers that stand beside the public prompts."""

from __future__ import annotations

import re
from collections import Counter

import torch
from pydantic import field_validator
from torch import Tensor

from fedcmp.federate.preference.rewards import REWARDS, Asking, Candidates, Judge, Reward, Setting


@REWARDS.register("truth")
class Truth(Reward):
    """F1 of the words, or of what matches `pattern`, of an answer and of the one beside its prompt."""

    epochs: int = 0
    pattern: str = r"\w+"

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression: {error}") from None
        return pattern

    def judge(self, setting: Setting) -> Judge:
        """Without weights."""
        return _Truth(setting.asking, re.compile(self.pattern))


class _Truth(Judge):
    def __init__(self, asking: Asking, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self._asking, self._pattern = asking, pattern

    def forward(self, candidates: Candidates) -> Tensor:
        said = self._asking.said(candidates)
        wanted = [text.turns[-1].content for text in candidates.texts]
        scores = [self._agreement(*pair) for pair in zip(said, wanted, strict=True)]
        return torch.tensor(scores, device=candidates.features.device)

    def _agreement(self, said: str, wanted: str) -> float:
        one, other = (Counter(self._pattern.findall(text.lower())) for text in (said, wanted))
        # Where the pattern is in neither, whole answers are compared.
        if not other:
            one, other = Counter([said.lower().strip()]), Counter([wanted.lower().strip()])
        return 2 * (one & other).total() / max(one.total() + other.total(), 1)
