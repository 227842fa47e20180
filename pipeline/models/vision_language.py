"""A projector in front of the frozen LLM: what is trained, and what answers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.projectors.base import Projector
from fedcmp.pipeline.models.prompts import Tokens


@dataclass(frozen=True)
class VisionLanguage:
    """A projector in front of the frozen LLM.

    Visual tokens stand between the two: whoever trains projectors alone cuts the graph there, so that the
    texts of many projectors go through the LLM together, in parts of any size, and only the gradient of
    the visual tokens comes back.

    Attributes:
        projector: Makes visual tokens of features.
        language: The LLM, which many may share.
    """

    projector: Projector
    language: FrozenLanguageModel

    def copied(self) -> VisionLanguage:
        """The same LLM behind a projector of its own with the same weights."""
        return replace(self, projector=copy.deepcopy(self.projector))

    def trainable(self) -> dict[str, nn.Parameter]:
        """What training moves, by name: the projector's parameters, since those of the LLM are frozen."""
        return dict(self.projector.named_parameters())

    def visual(self, features: Tensor) -> Tensor:
        """Visual tokens `(pictures, tokens, d_llm)` of features `(pictures, patches, d_vision)` float32."""
        tokens: Tensor = self.projector(features.to(self.language.device))
        return tokens

    def losses(self, ids: Tensor, labels: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of every supervised token.

        Args:
            ids: `(texts, length)` int64.
            labels: `(texts, length)` int64, `IGNORE_INDEX` where nothing is predicted.
            visual: Visual tokens of each text's picture, `(texts, tokens, d_llm)`.

        Returns:
            Losses `(supervised,)` float32 and the row of each `(supervised,)` int64.
        """
        return self.language.token_losses(ids, labels, visual)

    def generate(
        self,
        prompts: Sequence[Tokens],
        visual: Tensor,
        owners: Sequence[int],
        *,
        max_new_tokens: int,
        stop: str | None,
    ) -> list[str]:
        """Greedy answers.

        Args:
            prompts: What is asked.
            visual: `(pictures, tokens, d_llm)`.
            owners: The picture of each prompt.
            max_new_tokens: Tokens an answer may have.
            stop: A string that also ends an answer.
        """
        return self.language.generate(prompts, visual, owners, max_new_tokens=max_new_tokens, stop=stop)
