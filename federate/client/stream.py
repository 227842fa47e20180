"""A client's stream: passes over all training texts of its silos, split over its turns."""

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
    """Samples of one local step: features on the LLM's device, all else on the CPU.

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
    """Passes over the training texts of one or more silos, one after the other.

    The order depends on the seed, the silos' names and the number of the pass alone, so it is the same
    whichever clients ran before, and after resuming. No batch has samples of two passes.

    Args:
        caches: The client's silos.
        language: Tokenises the texts and holds the batches' device.
        template: How texts become prompts.
        max_length: Tokens a sample may have.
        batch_size: Samples a step.
        turns: Rounds the client takes part in, which the passes are split over.
        seed: Seed of the experiment.
        passes: How often every text is trained on.
        visual_tokens: Tokens an image takes in a prompt; as many as it has cached patches if None.
        without: Texts to leave out, by silo.
        mismatched: Give every picture the text of another one.

    Raises:
        UserError: There are fewer training texts, in all passes, than turns.

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
        passes: int = 1,
        visual_tokens: int | None = None,
        without: Mapping[str, Mapping[int, str]] | None = None,
        mismatched: bool = False,
    ) -> None:
        self._caches = list(caches.values())
        self._language = language
        self._template, self._max_length = template, max_length
        self._visual_tokens = self._caches[0].patches if visual_tokens is None else visual_tokens
        self._batch_size, self._turns, self._passes = batch_size, turns, passes
        left_out = {silo: (without or {}).get(silo, {}) for silo in caches}
        usable = {silo: cache.usable_texts("train") for silo, cache in caches.items()}
        texts = [np.setdiff1d(usable[silo], np.array([*left_out[silo]], np.int64)) for silo in caches]
        self.counts = {
            silo: Counts(len(kept), len(left_out[silo])) for silo, kept in zip(caches, texts, strict=True)
        }
        where = np.repeat(np.arange(len(texts)), [len(indices) for indices in texts])
        self._samples = samples = np.stack([where, np.concatenate(texts)], axis=1)
        name = int.from_bytes(hashlib.sha256("\0".join(caches).encode()).digest()[:8], "little")
        self._entropy = [seed, name]
        self._orders: dict[int, np.ndarray] = {}
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
        without_them = f" (besides {len(reasons)} that cannot be trained on)" if reasons else ""
        self._require_enough(len(samples), f"training texts{without_them}")

    def _require_enough(self, number: int, what: str) -> None:
        """Require a sample for every turn.

        Raises:
            UserError: There is none.
        """
        if number * self._passes < self._turns:
            often = f", {self._passes} times each," if self._passes > 1 else ""
            raise UserError(
                f"silo {', '.join(self.counts)}: {number} {what}{often} do not fill its {self._turns} "
                "rounds; lower federate.rounds, or raise federate.passes"
            )

    @property
    def size(self) -> int:
        """Samples of one pass."""
        return len(self._samples)

    def parts(self, turn: int) -> dict[int, range]:
        """The passes that a turn is of, and which places in their orders it takes."""
        size = self.size
        start, stop = (size * self._passes * number // self._turns for number in (turn, turn + 1))
        return {
            number: range(max(start - number * size, 0), min(stop - number * size, size))
            for number in range(start // size, -(-stop // size))
        }

    def _order(self, number: int) -> np.ndarray:
        """`(size,)` int64: the samples in the order of a pass."""
        if number not in self._orders:
            key = (number,) if number else ()
            generator = np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=key))
            # A turn may be of two passes; more need not be held.
            kept = {other: order for other, order in self._orders.items() if other == number - 1}
            self._orders = kept | {number: generator.permutation(self.size)}
        return self._orders[number]

    def _taken(self, parts: Mapping[int, range]) -> Iterator[np.ndarray]:
        """Samples of passes by their places in it: where they are among all."""
        for number, places in parts.items():
            yield self._order(number)[places.start : places.stop]

    def samples(self, turn: int) -> np.ndarray:
        """What a turn takes: `(samples, 2)` of (silo, text index)."""
        return self._all_texts(self.parts(turn))

    def _all_texts(self, parts: Mapping[int, range]) -> np.ndarray:
        return np.concatenate([np.zeros((0, 2), np.int64), *map(self._texts, self._taken(parts))])

    def _texts(self, taken: np.ndarray) -> np.ndarray:
        """The texts of samples."""
        return self._samples[taken]

    def content(self, turn: int, number: int | None = None) -> str:
        """SHA-256 of what a turn takes, in all or of one pass, from the caches' own hashes."""
        silos = [cache.content for cache in self._caches]
        flags = ["mismatched"] if self._mismatched else []
        parts = {each: places for each, places in self.parts(turn).items() if number in (None, each)}
        return fingerprint([silos, self._all_texts(parts).tolist(), *flags])

    def steps(self, turn: int) -> int:
        """Local steps of a turn."""
        return sum(-(-len(places) // self._batch_size) for places in self.parts(turn).values())

    def batches(self, turn: int) -> Iterator[Batch]:
        """Batches of a turn, the last one of each pass perhaps smaller."""
        for taken in self._taken(self.parts(turn)):
            yield from self._batches(taken)

    def _batches(self, taken: np.ndarray) -> Iterator[Batch]:
        samples = self._texts(taken)
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
