"""A projector in front of the LLM: what is trained, and what answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.lora import divided
from fedcmp.pipeline.models.projector import State, state_of
from fedcmp.pipeline.models.projectors.base import Projector
from fedcmp.pipeline.models.prompts import Tokens


@dataclass(frozen=True)
class VisionLanguage:
    """A projector in front of the frozen LLM.

    Visual tokens stand between the two: whoever trains projectors alone cuts the graph there, so that the
    texts of many projectors go through the LLM together, in parts of any size, and only the gradient of
    the visual tokens comes back. An adapter is in the one LLM that all share, so that with one only the
    texts of a single client go through it together.

    Attributes:
        projector: Makes visual tokens of features.
        language: The LLM, which many may share.
    """

    projector: Projector
    language: FrozenLanguageModel

    def copied(self) -> VisionLanguage:
        """The same LLM, adapter included, behind a projector of its own with the same weights."""
        return replace(self, projector=copy.deepcopy(self.projector))

    def trainable(self) -> dict[str, nn.Parameter]:
        """What training moves, by name: the projector's parameters and the adapter's."""
        return dict(self.projector.named_parameters()) | self.language.adapter

    def state(self) -> State:
        """A copy of what is trained on the CPU, buffers of the projector included."""
        return state_of(self.projector) | {
            name: matrix.detach().cpu().clone() for name, matrix in self.language.adapter.items()
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a state in place.

        Raises:
            RuntimeError: Its names or shapes are others.
        """
        projector, adapter = divided(state)
        self.projector.load_state_dict(projector)
        if adapter.keys() != self.language.adapter.keys():
            raise RuntimeError("its adapter is of other layers than the LLM's")
        for name, matrix in self.language.adapter.items():
            matrix.copy_(adapter[name])

    def visual(self, features: Tensor) -> Tensor:
        """Visual tokens `(pictures, tokens, d_llm)` of features `(pictures, patches, d_vision)` float32."""
        tokens: Tensor = self.projector(features.to(self.language.device))
        return tokens

    def visual_parts(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `visual`, with the projector's own losses by name."""
        return self.projector.parts(features.to(self.language.device))

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
