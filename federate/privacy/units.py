"""Streams whose samples are units: pictures or patients, each with all that is said about it.

What a unit is, is a function of a record: the hash of its picture, or the patient that its id names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from fedcmp.federate.client.stream import Batch, Stream
from fedcmp.federate.client.texts import Counts
from fedcmp.pipeline.cache import FeatureCache
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import tokenise_all
from fedcmp.pipeline.privacy import Privacy

_Keys = Callable[[str, FeatureCache, Sequence[int]], list[Hashable]]
# The texts about one picture, each as (silo, text index).
_Picture = list[list[int]]


@dataclass(frozen=True)
class Unit:
    """What the samples of a stream are.

    Attributes:
        keys: Given a silo, its cache and rows of images, which unit each image belongs to.
        plural: What several are called.
        pattern: Regular expression that finds it in an id; None where nothing is searched.
        most_texts: Texts of one that are trained on at most; None for all.
    """

    keys: _Keys
    plural: str
    pattern: str | None = None
    most_texts: int | None = None


def unit_of(options: Privacy | None) -> Unit | None:
    """What is private where that is more than a single text; None where it is not."""
    if options is None or options.clip is None:
        return None
    if options.unit == "image":
        return Unit(_pictures, "different pictures")
    if options.unit == "patient":
        assert options.patient is not None
        return Unit(_patients(options.patient), "patients", options.patient, options.most_texts)
    return None


def _pictures(silo: str, cache: FeatureCache, rows: Sequence[int]) -> list[Hashable]:
    """Files of the same bytes are one picture, wherever they lie."""
    hashes = cache.array("images/sha256")
    return [hashes[row].tobytes() for row in rows]


def _patients(pattern: str) -> _Keys:
    """Each silo has patients of its own, as its names for them say nothing elsewhere."""
    search = re.compile(pattern).search

    def keys(silo: str, cache: FeatureCache, rows: Sequence[int]) -> list[Hashable]:
        found: list[Hashable] = []
        for row in rows:
            match = search(cache.ids[row])
            patient = match and match[match.re.groups]
            if not patient:
                raise UserError(
                    f"silo '{silo}', image {cache.ids[row]!r}: federate.privacy.patient = {pattern!r} finds "
                    "no patient in it; give a pattern that finds one in every id, or leave the image out"
                )
            found.append((silo, patient))
        return found

    return keys


class UnitStream(Stream):
    """Passes over the units of one or more silos; a step takes `batch_size` of them, with their texts.

    The order depends on the seed, the silos' names and the numbers of units and of the pass alone, and which
    texts of one are left out on how many it has: so no unit has a say in where another one is.

    Args:
        caches: The client's silos.
        language: As in `Stream`.
        unit: What the samples are.
        **options: The rest of `Stream`'s.

    Raises:
        UserError: There are fewer units, in all passes, than turns, or a record is of none.
    """

    def __init__(
        self,
        caches: Mapping[str, FeatureCache],
        language: FrozenLanguageModel,
        *,
        unit: Unit,
        **options: Any,
    ) -> None:
        super().__init__(caches, language, **options)
        self._hashes = [cache.array("images/sha256") for cache in self._caches]
        found = [self._bounded(texts, unit.most_texts) for texts in self._grouped(unit).values()]
        if unit.pattern is not None:
            self._tell(unit.pattern, len(found))
        self._require_enough(len(found), unit.plural)
        self._units = [self._by_picture(texts) for texts in found]
        self._count(unit.most_texts)

    def _grouped(self, unit: Unit) -> dict[Hashable, _Picture]:
        """All texts by their unit, both in the silos' order."""
        samples = np.array(sorted(self._samples.tolist()))
        grouped: dict[Hashable, _Picture] = {}
        for number, (silo, cache) in enumerate(zip(self.counts, self._caches, strict=True)):
            texts = samples[samples[:, 0] == number, 1]
            keys = unit.keys(silo, cache, cache.text_image[texts].tolist())
            for key, text in zip(keys, texts.tolist(), strict=True):
                grouped.setdefault(key, []).append([number, text])
        return grouped

    def _bounded(self, texts: _Picture, most: int | None) -> _Picture:
        if most is None or len(texts) <= most:
            return texts
        chosen = np.random.default_rng([*self._entropy, len(texts)]).choice(len(texts), most, replace=False)
        return [texts[place] for place in sorted(chosen)]

    def _tell(self, pattern: str, patients: int) -> None:
        """Say what hints at a pattern that finds something else than patients."""
        records = {(silo, self._caches[silo].text_image[text]) for silo, text in self._samples.tolist()}
        where = f"{', '.join(self.counts)}: by federate.privacy.patient = {pattern!r}"
        if len(records) > 1 and patients in (1, len(records)):
            each = "all of one patient" if patients == 1 else "each of a patient of its own"
            say(f"{where} {len(records):,} pictures are {each}; make sure that they are")

    def _count(self, most: int | None) -> None:
        """Correct what is trained on and what is left out."""
        taken = Counter(silo for unit in self._units for picture in unit for silo, _ in picture)
        for number, (silo, counts) in enumerate(self.counts.items()):
            left = counts.samples - taken[number]
            if left:
                say(
                    f"{silo}: {left:,} of {counts.samples:,} training texts are left out, as each patient "
                    f"has at most {most} (federate.privacy.most_texts)"
                )
                self.counts[silo] = Counts(taken[number], counts.left_out + left)

    def _by_picture(self, texts: _Picture) -> list[_Picture]:
        pictures: dict[Hashable, _Picture] = {}
        for silo, text in texts:
            cache = self._caches[silo]
            sha = self._hashes[silo][cache.text_image[text]].tobytes()
            pictures.setdefault(sha, []).append([silo, text])
        return list(pictures.values())

    @property
    def size(self) -> int:
        """Units of one pass."""
        return len(self._units)

    def _texts(self, taken: np.ndarray) -> np.ndarray:
        """The texts of units, unit by unit: `(texts, 2)` of (silo, text index)."""
        return np.array([text for place in taken for picture in self._units[place] for text in picture])

    def _batches(self, taken: np.ndarray) -> Iterator[Batch]:
        """A row of features a picture, a row of tokens a text, both unit by unit."""
        part = [self._units[place] for place in taken]
        rows = [[silo, self._caches[silo].text_image[text]] for unit in part for (silo, text), *_ in unit]
        features = self._features(np.array(rows))
        with closing(features):
            single = (row for some in features for row in some.split(1))
            for start in range(0, len(part), self._batch_size):
                some = part[start : start + self._batch_size]
                pictures = [picture for unit in some for picture in unit]
                tokens = tokenise_all(
                    [self._caches[silo].text(text) for picture in pictures for silo, text in picture],
                    self._template,
                    self._language.tokenizer,
                    patches=self._visual_tokens,
                    max_length=self._max_length,
                )
                yield Batch(
                    torch.cat(list(islice(single, len(pictures)))),
                    *self._language.collate(tokens),
                    owners=_owners(pictures),
                    units=_owners(some),
                )


def _owners(groups: Sequence[Sequence[Any]]) -> torch.Tensor:
    """`(members of all groups,)` int64: the group of each."""
    return torch.repeat_interleave(torch.tensor([len(group) for group in groups]))
