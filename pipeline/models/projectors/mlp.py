"""LLaVA-1.5's projector (Liu et al., 2023, arXiv 2310.03744): linear layers with GELU between them."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu

from fedcmp.pipeline.models.projectors import PROJECTORS, Architecture, Projector


class MlpProjector(Projector):
    """Layers `linear_1` to `linear_N`, as Hugging Face's LLaVA names them."""

    def __init__(self, d_vision: int, d_llm: int, depth: int) -> None:
        super().__init__(d_vision, d_llm)
        self.depth = depth
        for number in range(1, depth + 1):
            self.add_module(f"linear_{number}", nn.Linear(d_vision if number == 1 else d_llm, d_llm))

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, patches, d_llm)`."""
        hidden: Tensor = self.get_submodule("linear_1")(features)
        for number in range(2, self.depth + 1):
            hidden = self.get_submodule(f"linear_{number}")(gelu(hidden))
        return hidden


@PROJECTORS.register("mlp{depth}x_gelu")
class Mlp(Architecture):
    """LLaVA's name says how deep it is: `mlp2x_gelu` has two layers.

    Args:
        depth: Linear layers.
    """

    depth: int = Field(ge=1)

    def module(self, d_vision: int, d_llm: int) -> Projector:
        """A projector with arbitrary weights."""
        return MlpProjector(d_vision, d_llm, self.depth)

    def widths(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """`(d_vision, d_llm)` of saved weights."""
        d_llm, d_vision = state["linear_1.weight"].shape
        return d_vision, d_llm
