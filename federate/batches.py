"""A client's stream: every training text of its silos once, shuffled, split over the rounds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import FeatureCache
from pipeline.errors import UserError
from pipeline.language import FrozenLanguageModel
from pipeline.prompts import tokenise


@dataclass(frozen=True)
class Batch:
    """Samples of one local step.

    Attributes:
        features: `(batch, patches, d_vision)` float32.
        ids: `(batch, length)` int64, padded on the right.
        labels: `(batch, length)` int64.
    """

    features: Tensor
    ids: Tensor
    labels: Tensor


class Stream:
    """One pass over the training texts of one or more silos.

    The order depends on the seed and the silos' names alone, so it is the same whichever clients
    ran before, and after resuming.

    Args:
        caches: The client's silos.
        language: Tokenises the texts and holds the batches' device.
        template: How texts become prompts.
        max_length: Tokens a sample may have.
        batch_size: Samples a step.
        rounds: Rounds the pass is split over.
        seed: Seed of the experiment.

    Raises:
        UserError: There are fewer training texts than rounds.
    """

    def __init__(
        self,
        caches: Mapping[str, FeatureCache],
        language: FrozenLanguageModel,
        *,
        template: str,
        max_length: int,
        batch_size: int,
        rounds: int,
        seed: int,
    ) -> None:
        self._caches = list(caches.values())
        self._language = language
        self._template, self._max_length = template, max_length
        self._batch_size, self._rounds = batch_size, rounds
        texts = [cache.usable_texts("train") for cache in self._caches]
        where = np.repeat(np.arange(len(texts)), [len(indices) for indices in texts])
        samples = np.stack([where, np.concatenate(texts)], axis=1)
        name = int.from_bytes(hashlib.sha256("\0".join(caches).encode()).digest()[:8], "little")
        self._samples = np.random.default_rng([seed, name]).permutation(samples)
        if not len(samples):
            others = sum(cache.texts for cache in self._caches)
            raise UserError(
                f"silo {', '.join(caches)} has no training text ({others} texts of other splits or without "
                "a readable image); remove it from federate.silos, or mend its source and extract it again"
            )
        if len(samples) < rounds:
            raise UserError(
                f"silo {', '.join(caches)}: {len(samples)} training texts do not fill "
                f"federate.rounds = {rounds}; use fewer rounds"
            )

    def samples(self, round_: int) -> np.ndarray:
        """What a round takes: `(samples, 2)` of (silo, text index)."""
        size = len(self._samples)
        return self._samples[size * round_ // self._rounds : size * (round_ + 1) // self._rounds]

    def steps(self, round_: int) -> int:
        """Local steps of a round."""
        return -(-len(self.samples(round_)) // self._batch_size)

    def batches(self, round_: int) -> Iterator[Batch]:
        """Batches of a round, the last one perhaps smaller."""
        samples = self.samples(round_)
        for start in range(0, len(samples), self._batch_size):
            yield self._batch(samples[start : start + self._batch_size])

    def _batch(self, samples: Sequence[Sequence[int]] | np.ndarray) -> Batch:
        tokens, features = [], []
        for silo, index in samples:
            cache = self._caches[silo]
            tokens.append(
                tokenise(
                    cache.text(index),
                    self._template,
                    self._language.tokenizer,
                    patches=cache.patches,
                    max_length=self._max_length,
                )
            )
            features.append(cache.tensor([cache.text_image[index]]))
        ids, labels = self._language.collate(tokens)
        return Batch(torch.cat(features).float().to(ids.device), ids, labels)
