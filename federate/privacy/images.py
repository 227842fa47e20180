"""A stream whose samples are pictures, each with all that is said about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
import torch

from federate.batches import Batch, Stream
from pipeline.cache import FeatureCache
from pipeline.errors import UserError
from pipeline.language import FrozenLanguageModel
from pipeline.prompts import tokenise_all


class ImageStream(Stream):
    """One pass over the pictures of one or more silos; a step takes `batch_size` of them, with their texts.

    Files of the same bytes are one picture, wherever they lie. The order depends on the seed, the silos'
    names and the number of pictures alone.

    Args:
        caches: The client's silos.
        language: As in `Stream`.
        seed: As in `Stream`.
        turns: As in `Stream`.
        **options: The rest of `Stream`'s.

    Raises:
        UserError: There are fewer pictures than turns.
    """

    def __init__(
        self,
        caches: Mapping[str, FeatureCache],
        language: FrozenLanguageModel,
        *,
        seed: int,
        turns: int,
        **options: Any,
    ) -> None:
        super().__init__(caches, language, seed=seed, turns=turns, **options)
        hashes = [cache.array("images/sha256") for cache in self._caches]
        grouped: dict[bytes, list[list[int]]] = {}
        for silo, text in sorted(self._samples.tolist()):
            picture = hashes[silo][self._caches[silo].text_image[text]].tobytes()
            grouped.setdefault(picture, []).append([silo, text])
        if len(grouped) < turns:
            raise UserError(
                f"silo {', '.join(caches)}: {len(grouped)} different pictures do not fill its {turns} "
                "rounds; lower federate.rounds"
            )
        pictures = list(grouped.values())
        order = np.random.default_rng(self._entropy).permutation(len(pictures))
        self._pictures = [pictures[place] for place in order]

    @property
    def size(self) -> int:
        """Pictures of the whole pass."""
        return len(self._pictures)

    def samples(self, turn: int) -> np.ndarray:
        """The texts that a turn takes, picture by picture: `(texts, 2)` of (silo, text index)."""
        return np.array([text for picture in self._part(turn) for text in picture])

    def steps(self, turn: int) -> int:
        """Local steps of a turn."""
        return -(-len(self._part(turn)) // self._batch_size)

    def _part(self, turn: int) -> list[list[list[int]]]:
        size = len(self._pictures)
        return self._pictures[size * turn // self._turns : size * (turn + 1) // self._turns]

    def batches(self, turn: int) -> Iterator[Batch]:
        """Batches of a turn: a row of features a picture, a row of tokens a text."""
        part = self._part(turn)
        rows = [[silo, self._caches[silo].text_image[text]] for (silo, text), *_ in part]
        device = torch.device(self._language.device)
        features = self._features(np.array(rows))
        with closing(features):
            for start in range(0, len(part), self._batch_size):
                some = part[start : start + self._batch_size]
                tokens = tokenise_all(
                    [self._caches[silo].text(text) for picture in some for silo, text in picture],
                    self._template,
                    self._language.tokenizer,
                    patches=self._visual_tokens,
                    max_length=self._max_length,
                )
                owners = torch.repeat_interleave(torch.tensor([len(picture) for picture in some]))
                yield Batch(next(features), *self._language.collate(tokens), owners.to(device))
