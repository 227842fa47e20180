"""A small transformer over patches and words: a reward model without a language model."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fedcmp.federate.preference.rewards import REWARDS, Candidates, Judge, Reward, Setting
from fedcmp.pipeline.models.prompts import IMAGE_TOKEN_INDEX

_PATCH, _QUESTION, _ANSWER = range(3)


@REWARDS.register("cross")
class Cross(Reward):
    """r(x, y) of the first of all tokens: patches, the question's words, the answer's words.

    Args:
        width: Of its tokens.
        layers: How many.
        heads: Of each layer.
        longest: Words that have positions of their own; later ones share the last.
    """

    decay: float = Field(1e-3, ge=0)
    width: int = Field(64, ge=2)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    longest: int = Field(256, ge=1)

    def judge(self, setting: Setting) -> Judge:
        """The transformer."""
        words = setting.asking.language.rows
        # Its initial weights are those of the site's generator, not of the process.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=setting.generator)))
            judge = _Cross(self, setting.d_vision, words)
        return judge.to(setting.asking.language.device)


class _Cross(Judge):
    def __init__(self, options: Cross, d_vision: int, words: int) -> None:
        super().__init__()
        width = options.width
        self.longest = options.longest
        self.patches, self.words = nn.Linear(d_vision, width), nn.Embedding(words, width)
        self.parts, self.places = nn.Embedding(3, width), nn.Embedding(options.longest, width)
        self.first = nn.Parameter(torch.zeros(width))
        layer = nn.TransformerEncoderLayer(
            width, options.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, options.layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 1)

    def forward(self, candidates: Candidates) -> Tensor:
        device = self.first.device
        seen = self.patches(candidates.features)[candidates.owners.to(device)] + self.parts.weight[_PATCH]
        words, parts = [], []
        for prompt, answer in zip(candidates.prompts, candidates.answers, strict=True):
            asked = [token for token in prompt.ids if token != IMAGE_TOKEN_INDEX]
            words.append(torch.tensor([*asked, *answer]))
            parts.append(torch.tensor([*[_QUESTION] * len(asked), *[_ANSWER] * len(answer)]))
        ids, of = (pad_sequence(each, batch_first=True).to(device) for each in (words, parts))
        places = torch.arange(ids.shape[1], device=device).clamp(max=self.longest - 1)
        told = self.words(ids) + self.parts(of) + self.places(places)
        lengths = torch.tensor([len(each) for each in words], device=device)
        absent = torch.arange(ids.shape[1], device=device) >= lengths[:, None]
        first = self.first.expand(len(candidates), 1, -1)
        hidden = torch.cat([first, seen, told], 1)
        padding = torch.cat([absent.new_zeros(len(candidates), 1 + seen.shape[1]), absent], 1)
        rewards: Tensor = self.head(self.layers(hidden, src_key_padding_mask=padding)[:, 0]).squeeze(1)
        return rewards
