"""Pure functions of predictions and references, by the benchmarks' official rules."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

_PTB_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


def pope_label(answer: str) -> str:
    """`yes` or `no` by POPE's rule (AoiDragon/POPE, evaluate.py).

    Only the text before the first full stop counts; commas are dropped; the answer is no if
    `No`, `not` or `no` is among the words split at single spaces, else yes.
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def caption_tokens(caption: str) -> list[str]:
    """Tokens as coco-caption's PTB tokenizer gives them, with nltk's Treebank rules and no Java."""
    text = re.sub(r"`+", " `` ", " ".join(caption.split()).lower())
    return [token for token in _treebank().tokenize(text) if token not in _PTB_PUNCTUATION]


@cache
def _treebank() -> Any:
    from nltk.tokenize import TreebankWordTokenizer

    return TreebankWordTokenizer()


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


_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_RESTORED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS
    for place, letter in enumerate(word)
    if letter == "'"
}


def vqa_normalise(answer: str) -> str:
    """The normal form of an answer in the VQA evaluation (punctuation, numbers, articles)."""
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    number = re.search(r"\d,\d", text) is not None
    normal = text
    for mark in _PUNCTUATION:
        spaced = f"{mark} " in text or f" {mark}" in text or number
        normal = normal.replace(mark, "" if spaced else " ")
    normal = re.sub(r"\.(?!\d)", "", normal)
    words = [_NUMBERS.get(word, word) for word in normal.lower().split()]
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def evalai_normalise(answer: str) -> str:
    """The EvalAI answer processor, by which LLaVA treats predictions before the official code."""
    words = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return vqa_normalise(words)


def vqa_accuracy(
    prediction: str, answers: Sequence[str], *, normalise_first: bool = True, numbered: bool = True
) -> float:
    """Leave-one-out VQA accuracy in [0, 1]: the mean over annotators of min(agreeing others / 3, 1).

    The official code normalises nothing where all annotators agree word for word (since 2021);
    with `normalise_first` the prediction is normalised before, as LLaVA does.

    Args:
        prediction: Generated answer.
        answers: The annotators' answers, usually ten.
        normalise_first: Follow LLaVA rather than the bare official code.
        numbered: The annotations carry an `answer_id`. Where they do not, the official code leaves
            out, with each annotator, all others who said the same.
    """
    guess = evalai_normalise(prediction) if normalise_first else re.sub(r"[\n\t]", " ", prediction).strip()
    truths = list(answers)
    if len(set(truths)) > 1:
        guess = vqa_normalise(guess)
        truths = [vqa_normalise(answer) for answer in truths]
    agreeing = truths.count(guess)
    left_out = 1 if numbered else agreeing
    others = [agreeing - left_out * (truth == guess) for truth in truths]
    return sum(min(count / 3, 1.0) for count in others) / len(truths) if truths else 0.0
