"""How captions are scored, from their tokens: BLEU, ROUGE-L, CIDEr-D and named objects.

pycocoevalcap would bring 101 MB of jars and need Java for the same numbers, so its rules are written
out here; tests hold them against values of its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


def cider_d(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]
) -> np.ndarray:
    """CIDEr-D of every image (Vedantam et al., 2015), document frequencies from the references.

    Args:
        predictions: Tokens of one caption an image.
        references: Tokens of one or more captions an image.

    Returns:
        `(images,)` float64; the corpus score is their mean.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    for captions in references:
        frequency.update({ngram for caption in captions for ngram in _ngrams(caption)})
    log_images = math.log(max(len(references), 1))

    def vector(counts: Counter[tuple[str, ...]]) -> list[dict[tuple[str, ...], float]]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(4)]
        for ngram, count in counts.items():
            idf = log_images - math.log(max(frequency[ngram], 1))
            weights[len(ngram) - 1][ngram] = count * idf
        return weights

    scores = np.zeros(len(predictions))
    for place, (prediction, captions) in enumerate(zip(predictions, references, strict=True)):
        guess, total = vector(_ngrams(prediction)), 0.0
        for caption in captions:
            truth = vector(_ngrams(caption))
            gap = max(len(prediction) - 1, 0) - max(len(caption) - 1, 0)
            total += math.exp(-(gap**2) / 72) * sum(map(_clipped_cosine, guess, truth))
        scores[place] = 10 * total / (4 * len(captions))
    return scores


def _clipped_cosine(guess: dict[tuple[str, ...], float], truth: dict[tuple[str, ...], float]) -> float:
    norms = math.hypot(*guess.values()) * math.hypot(*truth.values())
    overlap = sum(
        min(weight, truth[ngram]) * truth[ngram] for ngram, weight in guess.items() if ngram in truth
    )
    return overlap / norms if norms else 0.0


def _ngrams(tokens: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(
        tuple(tokens[start : start + size]) for size in range(1, 5) for start in range(len(tokens) - size + 1)
    )


def object_matches(
    prediction: str, references: Sequence[str], pattern: re.Pattern[str]
) -> tuple[int, int, int]:
    """Objects named in a caption against those of its references, as multisets.

    Args:
        prediction: Generated caption.
        references: Reference captions; of several, the one that agrees best counts.
        pattern: Regular expression whose whole matches are the objects.

    Returns:
        Matched, predicted and referenced objects.
    """

    def objects(text: str) -> Counter[str]:
        return Counter(match.group().lower() for match in pattern.finditer(text))

    named = objects(prediction)
    counts = []
    for reference in references:
        there = objects(reference)
        counts.append(((named & there).total(), named.total(), there.total()))
    return max(counts, key=lambda c: f1(*c))


def f1(matched: float, predicted: float, referenced: float) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is predicted or referenced."""
    return 2 * matched / (predicted + referenced) if predicted + referenced else 0.0


def bleu(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> np.ndarray:
    """What corpus BLEU is made of (Papineni et al., 2002, as in coco-caption).

    Args:
        predictions: Tokens of one caption an image.
        references: Tokens of one or more captions an image.

    Returns:
        `(images, 10)` float64: n-grams of size 1 to 4 that agree, n-grams of size 1 to 4 predicted,
        tokens predicted, tokens of the reference of the nearest length.
    """
    rows = []
    for prediction, captions in zip(predictions, references, strict=True):
        guess = _ngrams(prediction)
        most: Counter[tuple[str, ...]] = Counter()
        for caption in captions:
            most |= _ngrams(caption)
        agreeing = [0] * 4
        for ngram, count in (guess & most).items():
            agreeing[len(ngram) - 1] += count
        said = [max(len(prediction) - size, 0) for size in range(4)]
        _, nearest = min((abs(len(caption) - len(prediction)), len(caption)) for caption in captions)
        rows.append([*agreeing, *said, len(prediction), nearest])
    return np.array(rows, float).reshape(-1, 10)


def bleu_score(sums: np.ndarray, size: int) -> np.ndarray:
    """BLEU-`size` from sums of `bleu`'s rows, with coco-caption's small constants.

    Args:
        sums: `(..., 10)`.
        size: 1 to 4.
    """
    precisions = (sums[..., :size] + 1e-15) / (sums[..., 4 : 4 + size] + 1e-9)
    brevity = (sums[..., 8] + 1e-15) / (sums[..., 9] + 1e-9)
    penalty = np.exp(np.minimum(1 - 1 / np.maximum(brevity, 1e-3), 0))
    return precisions.prod(-1) ** (1 / size) * penalty


def rouge_l(prediction: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L of one caption (Lin, 2004, as in coco-caption): best recall and best precision, beta 1.2."""
    # As the official code has it, no words at all are one empty word.
    said = list(prediction) or [""]
    common = [
        (_longest_common(said, list(reference) or [""]), len(reference) or 1) for reference in references
    ]
    precision = max(length for length, _ in common) / len(said)
    recall = max(length / words for length, words in common)
    return 2.44 * precision * recall / (recall + 1.44 * precision) if precision and recall else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, theirs in enumerate(other, 1):
            kept, row[place] = row[place], before + 1 if word == theirs else max(row[place], row[place - 1])
            before = kept
    return row[-1]
