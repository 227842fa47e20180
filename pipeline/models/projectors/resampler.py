"""A small resampler after Flamingo (Alayrac et al., 2022, arXiv 2204.14198) and Qwen-VL (arXiv 2308.12966).

One block: learned queries attend to the patches, then a feed-forward layer; both are residual and
normalised before. Patches get no positions of their own, since the encoder's features hold them.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from fedcmp.pipeline.models.projectors import PROJECTORS, Architecture, Projector, UserError


class ResamplerProjector(Projector):
    """Cross-attention of learned queries to the patches, and a feed-forward layer."""

    def __init__(self, d_vision: int, d_llm: int, queries: int, heads: int, expansion: int) -> None:
        super().__init__(d_vision, d_llm)
        self.heads = heads
        self.query = nn.Embedding(queries, d_llm)
        self.norm_query, self.norm_vision = nn.LayerNorm(d_llm), nn.LayerNorm(d_vision)
        self.to_query = nn.Linear(d_llm, d_llm)
        self.to_key, self.to_value = nn.Linear(d_vision, d_llm), nn.Linear(d_vision, d_llm)
        self.to_out = nn.Linear(d_llm, d_llm)
        self.norm_hidden = nn.LayerNorm(d_llm)
        self.up, self.down = nn.Linear(d_llm, expansion * d_llm), nn.Linear(expansion * d_llm, d_llm)

    def tokens(self, patches: int) -> int:
        """One token a query."""
        return self.query.num_embeddings

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, patches, d_vision)` to `(batch, queries, d_llm)`."""
        queries = self.query.weight.expand(len(features), -1, -1)
        patches = self.norm_vision(features)
        attended = scaled_dot_product_attention(
            self._by_head(self.to_query(self.norm_query(queries))),
            self._by_head(self.to_key(patches)),
            self._by_head(self.to_value(patches)),
        )
        tokens = queries + self.to_out(attended.transpose(1, 2).flatten(2))
        return tokens + self.down(gelu(self.up(self.norm_hidden(tokens))))

    def _by_head(self, rows: Tensor) -> Tensor:
        """`(batch, n, d_llm)` to `(batch, heads, n, d_llm / heads)`."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


@PROJECTORS.register("resampler")
class Resampler(Architecture):
    """A fixed number of visual tokens, whatever the number of patches.

    Args:
        queries: Visual tokens a picture.
        heads: Attention heads; they divide the LLM's width.
        expansion: Width of the feed-forward layer, in widths of the LLM.
    """

    queries: int = Field(64, ge=1)
    heads: int = Field(8, ge=1)
    expansion: int = Field(2, ge=1)

    def module(self, d_vision: int, d_llm: int) -> Projector:
        """A projector with arbitrary weights."""
        if d_llm % self.heads:
            raise UserError(
                f"federate.projector.heads = {self.heads}: does not divide the LLM's width {d_llm}; "
                "choose a divisor"
            )
        return ResamplerProjector(d_vision, d_llm, self.queries, self.heads, self.expansion)

    def widths(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """`(d_vision, d_llm)` of saved weights."""
        d_llm, d_vision = state["to_key.weight"].shape
        return d_vision, d_llm
