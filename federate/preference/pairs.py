"""A silo's preferences: which answer was chosen and which rejected, from its cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedcmp.federate.preference.candidates import Asking, Candidates
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.models.prompts import BadTextError
from fedcmp.pipeline.records import Text

_AT_ONCE = 1024


class Pairs:
    """Preferences of a cache.

    Args:
        cache: The silo's cache.
        asking: How texts become token ids.
        texts: Indices of their texts.
    """

    def __init__(self, cache: FeatureCache, asking: Asking, texts: np.ndarray) -> None:
        self._cache, self._asking, self._texts = cache, asking, texts

    def divided(self, every: int) -> tuple[Pairs, Pairs]:
        """Those of all pictures but every `every`th, and those of these."""
        held = self._cache.text_image[self._texts] % every == every - 1
        return (
            Pairs(self._cache, self._asking, self._texts[~held]),
            Pairs(self._cache, self._asking, self._texts[held]),
        )

    def __len__(self) -> int:
        return len(self._texts)

    def candidates(self, places: Sequence[int]) -> Candidates:
        """Pairs by their places: answers 2 i and 2 i + 1 are the chosen and the rejected one of pair i."""
        indices = self._texts[list(places)]
        texts = [self._cache.text(index) for index in indices]
        twice = [text for text in texts for _ in range(2)]
        read = self._asking.answers(twice, [answer for text in texts for answer in _answers(text)])
        features = self._cache.tensor(self._cache.text_image[indices])
        return Candidates(
            features.float().to(self._asking.language.device),
            torch.arange(len(indices)).repeat_interleave(2),
            twice,
            [prompt for prompt, _ in read],
            [answer for _, answer in read],
        )


def read_pairs(cache: FeatureCache, asking: Asking) -> tuple[Pairs, dict[int, str]]:
    """The preferences of a cache that can be used, and why others cannot, by index of the text."""
    left_out: dict[int, str] = {}
    indices = cache.usable_texts("train", preferences=True)
    for start in range(0, len(indices), _AT_ONCE):
        some = indices[start : start + _AT_ONCE].tolist()
        for index, reason in zip(some, _problems([cache.text(index) for index in some], asking), strict=True):
            if reason is not None:
                left_out[index] = reason
    return Pairs(cache, asking, np.setdiff1d(indices, np.array([*left_out], np.int64))), left_out


def _problems(texts: Sequence[Text], asking: Asking) -> list[str | None]:
    """Why pairs cannot be used, or None: looked for one by one only where some cannot."""
    try:
        read = asking.answers(
            [text for text in texts for _ in range(2)], [each for t in texts for each in _answers(t)]
        )
    except BadTextError as error:
        if len(texts) == 1:
            return [str(error)]
        return [reason for text in texts for reason in _problems([text], asking)]
    same = "its answers are the same tokens"
    return [same if read[2 * place] == read[2 * place + 1] else None for place in range(len(texts))]


def _answers(text: Text) -> tuple[str, str]:
    assert text.rejected is not None
    return text.turns[-1].content, text.rejected
