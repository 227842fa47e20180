"""A projector whose hidden layer may be wider than the LLM's embeddings."""

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu

from fedcmp.pipeline.models.projectors import PROJECTORS, Architecture, Projector


class WideProjector(Projector):
    """Two layers with `hidden` numbers between."""

    def __init__(self, d_vision: int, d_llm: int, hidden: int) -> None:
        super().__init__(d_vision, d_llm)
        self.linear_1, self.linear_2 = nn.Linear(d_vision, hidden), nn.Linear(hidden, d_llm)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, patches, d_llm)`."""
        mapped: Tensor = self.linear_2(gelu(self.linear_1(features)))
        return mapped


@PROJECTORS.register("wide")
class Wide(Architecture):
    """As `mlp2x_gelu`, where that is always as wide as the LLM."""

    hidden: int = Field(ge=1)

    def module(self, d_vision: int, d_llm: int) -> Projector:
        """A projector with arbitrary weights."""
        return WideProjector(d_vision, d_llm, self.hidden)

    def widths(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """`(d_vision, d_llm)` of saved weights."""
        return state["linear_1.weight"].shape[1], state["linear_2.weight"].shape[0]
