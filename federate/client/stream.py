"""A client's stream: every training text of its silos once, shuffled, split over its turns."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedcmp.federate.client.texts import Counts
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.cache.loader import float_batches
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import tokenise_all

_TOKENISED_AHEAD = 256


@dataclass(frozen=True)
class Batch:
    """Samples of one local step.

    Attributes:
        features: `(pictures, patches, d_vision)` float32.
        ids: `(texts, length)` int64, padded on the right.
        labels: `(texts, length)` int64.
        owners: `(texts,)` int64, the row of features that each text is about, where they are not one each.
        units: `(pictures,)` int64, ascending without gaps: which sample each row of features is of, where
            they are not one each.
    """

    features: Tensor
    ids: Tensor
    labels: Tensor
    owners: Tensor | None = None
    units: Tensor | None = None

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.features) if self.units is None else int(self.units[-1]) + 1


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
        turns: Rounds the client takes part in, which the pass is split over.
        seed: Seed of the experiment.
        visual_tokens: Tokens an image takes in a prompt; as many as it has cached patches if None.
        without: Texts to leave out, by silo.
        mismatched: Give every picture the text of another one.

    Raises:
        UserError: There are fewer training texts than turns.

    Attributes:
        counts: Texts that are trained on, and that are left out, by silo.
    """

    def __init__(
        self,
        caches: Mapping[str, FeatureCache],
        language: FrozenLanguageModel,
        *,
        template: str,
        max_length: int,
        batch_size: int,
        turns: int,
        seed: int,
        visual_tokens: int | None = None,
        without: Mapping[str, Mapping[int, str]] | None = None,
        mismatched: bool = False,
    ) -> None:
        self._caches = list(caches.values())
        self._language = language
        self._template, self._max_length = template, max_length
        self._visual_tokens = self._caches[0].patches if visual_tokens is None else visual_tokens
        self._batch_size, self._turns = batch_size, turns
        left_out = {silo: (without or {}).get(silo, {}) for silo in caches}
        usable = {silo: cache.usable_texts("train") for silo, cache in caches.items()}
        texts = [np.setdiff1d(usable[silo], np.array([*left_out[silo]], np.int64)) for silo in caches]
        self.counts = {
            silo: Counts(len(kept), len(left_out[silo])) for silo, kept in zip(caches, texts, strict=True)
        }
        where = np.repeat(np.arange(len(texts)), [len(indices) for indices in texts])
        samples = np.stack([where, np.concatenate(texts)], axis=1)
        name = int.from_bytes(hashlib.sha256("\0".join(caches).encode()).digest()[:8], "little")
        self._entropy = [seed, name]
        self._samples = np.random.default_rng(self._entropy).permutation(samples)
        self._mismatched = mismatched
        reasons = [reason for found in left_out.values() for reason in found.values()]
        if not len(samples) and reasons:
            raise UserError(
                f"silo {', '.join(caches)}: none of its {len(reasons)} training texts can be trained on; the "
                f"first: {reasons[0]}"
            )
        if not len(samples):
            others = sum(cache.texts for cache in self._caches)
            raise UserError(
                f"silo {', '.join(caches)} has no training text ({others} texts of other splits or without "
                "a readable image); remove it from federate.silos, or fix its source and extract it again"
            )
        if len(samples) < turns:
            without_them = f" (besides {len(reasons)} that cannot be trained on)" if reasons else ""
            raise UserError(
                f"silo {', '.join(caches)}: {len(samples)} training texts{without_them} do not fill "
                f"its {turns} rounds; lower federate.rounds"
            )

    @property
    def size(self) -> int:
        """Samples of the whole pass."""
        return len(self._samples)

    def samples(self, turn: int) -> np.ndarray:
        """What a turn takes: `(samples, 2)` of (silo, text index)."""
        size = len(self._samples)
        return self._samples[size * turn // self._turns : size * (turn + 1) // self._turns]

    def content(self, turn: int) -> str:
        """SHA-256 of what a turn takes, from the caches' own hashes."""
        silos = [cache.content for cache in self._caches]
        flags = ["mismatched"] if self._mismatched else []
        return fingerprint([silos, self.samples(turn).tolist(), *flags])

    def steps(self, turn: int) -> int:
        """Local steps of a turn."""
        return -(-len(self.samples(turn)) // self._batch_size)

    def batches(self, turn: int) -> Iterator[Batch]:
        """Batches of a turn, the last one perhaps smaller."""
        samples = self.samples(turn)
        rows = [[silo, self._caches[silo].text_image[index]] for silo, index in samples]
        features = self._features(np.array(rows).reshape(-1, 2))
        ahead = self._batch_size * max(_TOKENISED_AHEAD // self._batch_size, 1)
        with closing(features):
            for start in range(0, len(samples), ahead):
                for ids, labels in self._tokens(samples[start : start + ahead]):
                    yield Batch(next(features), ids, labels)

    def _features(self, rows: np.ndarray) -> Generator[Tensor, None, None]:
        """Of `(rows, 2)` of (silo, image row), a batch at a time."""
        return float_batches(self._caches, rows, self._batch_size, torch.device(self._language.device))

    def _tokens(self, samples: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        described = np.roll(samples, 1, axis=0) if self._mismatched else samples
        tokens = tokenise_all(
            [self._caches[silo].text(index) for silo, index in described],
            self._template,
            self._language.tokenizer,
            patches=self._visual_tokens,
            max_length=self._max_length,
        )
        for start in range(0, len(samples), self._batch_size):
            yield self._language.collate(tokens[start : start + self._batch_size])
