"""A small transformer over patches and words: a reward model without a language model."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from fedcmp.federate.preference.rewards import REWARDS, Candidates, Judge, Reward, Setting
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.prompts import IMAGE_TOKEN_INDEX

_PATCH, _QUESTION, _ANSWER = range(3)


@REWARDS.register("cross")
class Cross(Reward):
    """r(x, y) of the first of all tokens: patches, the question's words, the answer's words.

    Args:
        width: Of its tokens.
        layers: How many.
        heads: Of each layer; they share the width.
        longest: Words that have positions of their own; later ones share the last.
    """

    decay: float = Field(1e-3, ge=0)
    width: int = Field(64, ge=2)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    longest: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _heads_share_it(self) -> Cross:
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} is no multiple of heads = {self.heads}")
        return self

    def judge(self, setting: Setting) -> Judge:
        """The transformer."""
        judge = _Cross(self, setting.d_vision, setting.asking.language.rows)
        projectors.initialise(judge, setting.generator)
        return judge.to(setting.asking.language.device)


class _Layer(nn.Module):
    """Attention over all tokens and an MLP, normalised before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, present: Tensor) -> Tensor:
        """`(answers, tokens, width)`, of which `(answers, 1, 1, tokens)` bool are there."""
        parts = self.inputs(self.norm_1(hidden)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=present).transpose(1, 2).flatten(2)
        hidden = hidden + self.output(mixed)
        out: Tensor = hidden + self.down(gelu(self.up(self.norm_2(hidden))))
        return out


class _Cross(Judge):
    def __init__(self, options: Cross, d_vision: int, words: int) -> None:
        super().__init__()
        width = options.width
        self.longest = options.longest
        self.patches, self.words = nn.Linear(d_vision, width), nn.Embedding(words, width)
        self.parts, self.places = nn.Embedding(3, width), nn.Embedding(options.longest, width)
        self.first = nn.Embedding(1, width)
        self.layers = nn.ModuleList(_Layer(width, options.heads) for _ in range(options.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, candidates: Candidates) -> Tensor:
        device = self.first.weight.device
        seen = self.patches(candidates.features)[candidates.owners.to(device)] + self.parts.weight[_PATCH]
        words, parts = [], []
        for prompt, answer in zip(candidates.prompts, candidates.answers, strict=True):
            asked = [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
            words.append(torch.tensor([*asked, *answer]))
            parts.append(torch.tensor([_QUESTION] * len(asked) + [_ANSWER] * len(answer)))
        ids, of = (pad_sequence(each, batch_first=True).to(device) for each in (words, parts))
        places = torch.arange(ids.shape[1], device=device).clamp(max=self.longest - 1)
        told = self.words(ids) + self.parts(of) + self.places(places)
        lengths = torch.tensor([1 + seen.shape[1] + len(each) for each in words], device=device)
        hidden = torch.cat([self.first.weight.expand(len(candidates), 1, -1), seen, told], 1)
        present = torch.arange(hidden.shape[1], device=device) < lengths[:, None]
        for layer in self.layers:
            hidden = layer(hidden, present[:, None, None])
        rewards: Tensor = self.head(hidden[:, 0]).squeeze(1)
        return rewards
