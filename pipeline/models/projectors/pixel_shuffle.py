"""InternVL's projector (Chen et al., 2024, arXiv 2404.16821): fewer, wider patches, then an MLP."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu

from fedcmp.pipeline.models.projectors import PROJECTORS, Architecture, Projector, side_of


class PixelShuffleProjector(Projector):
    """Space-to-depth of the grid of patches, layer norm, two linear layers with GELU."""

    def __init__(self, d_vision: int, d_llm: int, scale: int) -> None:
        super().__init__(d_vision, d_llm)
        self.scale = scale
        self.norm = nn.LayerNorm(d_vision * scale**2)
        self.linear_1 = nn.Linear(d_vision * scale**2, d_llm)
        self.linear_2 = nn.Linear(d_llm, d_llm)

    def tokens(self, patches: int) -> int:
        """One token a square of `scale` x `scale` patches."""
        return (side_of(patches, self.scale) // self.scale) ** 2

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, patches / scale^2, d_llm)`, row by row."""
        cells = side_of(features.shape[1], self.scale) // self.scale
        grid = features.unflatten(1, (cells, self.scale, cells, self.scale))
        squares = grid.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.linear_2(gelu(self.linear_1(self.norm(squares))))


@PROJECTORS.register("pixel_shuffle_mlp")
class PixelShuffleMlp(Architecture):
    """Fewer visual tokens without losing features.

    Args:
        scale: Side of the square of patches that become one token.
    """

    scale: int = Field(2, ge=1)

    def module(self, d_vision: int, d_llm: int) -> Projector:
        """A projector with arbitrary weights."""
        return PixelShuffleProjector(d_vision, d_llm, self.scale)

    def widths(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """`(d_vision, d_llm)` of saved weights."""
        d_llm, width = state["linear_1.weight"].shape
        return width // self.scale**2, d_llm
