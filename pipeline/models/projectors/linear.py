"""LLaVA's first projector (Liu et al., 2023, arXiv 2304.08485): one linear layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fedcmp.pipeline.models.projectors import PROJECTORS, Architecture, Projector


class LinearProjector(Projector):
    """One linear layer."""

    def __init__(self, d_vision: int, d_llm: int) -> None:
        super().__init__(d_vision, d_llm)
        self.linear = nn.Linear(d_vision, d_llm)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, patches, d_llm)`."""
        return self.linear(features)


@PROJECTORS.register("linear")
class Linear(Architecture):
    """No options."""

    def module(self, d_vision: int, d_llm: int) -> Projector:
        """A projector with arbitrary weights."""
        return LinearProjector(d_vision, d_llm)

    def widths(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """`(d_vision, d_llm)` of saved weights."""
        d_llm, d_vision = state["linear.weight"].shape
        return d_vision, d_llm
