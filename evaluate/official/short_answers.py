"""Pure functions of one answer and its references, by the benchmarks' official rules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence


def pope_label(answer: str) -> str:
    """`yes` or `no` by POPE's rule (AoiDragon/POPE, evaluate.py).

    Only the text before the first full stop counts; commas are dropped; the answer is no if
    `No`, `not` or `no` is among the words split at single spaces, else yes.
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_decides(answer: str) -> bool:
    """Whether an answer says yes or no at all; POPE's rule takes what does not for yes."""
    return (
        pope_label(answer) == "no" or re.search(r"\b(yes|no|not|isn't|aren't)\b", answer.lower()) is not None
    )


def mme_label(answer: str) -> str:
    """`yes`, `no` or `other` by MME's rule (its eval_tool, calculation.py).

    Lower-cased, the answer is the word itself, or has it within its first four characters.
    """
    start = answer.lower()[:4]
    return next((label for label in ("yes", "no") if label in start), "other")


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)


def mmbench_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The option an answer names by MMBench's rule without a judge (VLMEvalKit, matching_util.py).

    One lone letter among its last five words; else `answer is X`; else the one option whose text
    the answer holds.

    Args:
        answer: Generated answer.
        choices: Text of every option by its letter.

    Returns:
        A letter, `Z` for a refusal, None where the rule decides nothing.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    named = [letter for letter in choices if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - 5:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    letters = "".join(sorted({*"ABCD", *choices}))
    said = re.search(rf"(?:correct\s+)?answer\s+is\s+\**([{letters}])\**", answer, re.IGNORECASE)
    if said and said[1].upper() in choices:
        return said[1].upper()
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    contained = [letter for letter, text in choices.items() if text.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def scienceqa_letter(answer: str) -> str | None:
    """The letter an answer names by LLaVA's rule (eval_science_qa.py), None where it names none.

    The bare letter, `X. ...`, or exactly one `The answer is X.`; `A.` alone is none of them.
    """
    if answer in ("A", "B", "C", "D", "E"):
        return answer
    if len(answer) >= 3 and answer[0] in "ABCDE" and answer[1:3] == ". ":
        return answer[0]
    said = re.findall(r"The answer is ([A-Z]).", answer)
    return str(said[0]) if len(said) == 1 else None


def gqa_answer(answer: str) -> str:
    """An answer as LLaVA's convert_gqa_for_eval.py hands it to GQA's exact match."""
    return answer.rstrip(".").lower()


_ARTICLES = frozenset(["a", "an", "the"])
_NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
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
} | {"somebody'd": "somebodyd"}
# VizWiz's table has most apostrophes as backticks, which no prediction still holds at that point.
_VIZWIZ_APOSTROPHES = frozenset(["aint", "arent", "cant", "couldve", "weve", "wheres", "whove"])
_VIZWIZ_RESTORED = {
    word: restored if word in _VIZWIZ_APOSTROPHES else restored.replace("'", "`")
    for word, restored in _RESTORED.items()
    if "'" not in word or word in ("couldn'tve", "hadn'tve")
}
_PERIODS = 32  # the official code hands re.UNICODE to re.sub as its count


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Text without punctuation, which becomes a space where it stood between letters."""
    number = re.search(r"\d,\d", text) is not None
    normal = text
    for mark in _PUNCTUATION:
        spaced = f"{mark} " in text or f" {mark}" in text or number
        normal = normal.replace(mark, "" if spaced else " ")
    return re.sub(r"\.(?!\d)", "", normal, count=_PERIODS)


def vqa_normalise(answer: str, restored: Mapping[str, str] = _RESTORED) -> str:
    """The normal form of an answer in the VQA evaluation (punctuation, numbers, articles).

    Args:
        answer: An answer.
        restored: Contractions by their forms without an apostrophe.
    """
    return " ".join(_normal_words(_one_line(answer), restored))


def _normal_words(text: str, restored: Mapping[str, str] = _RESTORED) -> list[str]:
    words = [_NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split()]
    return [restored.get(word, word) for word in words if word not in _ARTICLES]


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
    guess = evalai_normalise(prediction) if normalise_first else _one_line(prediction)
    truths = [_one_line(answer) for answer in answers]
    if len(set(truths)) > 1:
        guess = vqa_normalise(guess)
        truths = [vqa_normalise(answer) for answer in truths]
    return _leave_one_out(guess, truths, numbered=numbered)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy in [0, 1]: leave-one-out after the EvalAI processor, always on both sides."""
    return _leave_one_out(evalai_normalise(prediction), [evalai_normalise(answer) for answer in answers])


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz's accuracy in [0, 1]: leave-one-out; the prediction is normalised, the answers are not."""
    return _leave_one_out(vqa_normalise(prediction, _VIZWIZ_RESTORED), answers)


def aokvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's accuracy in [0, 1]: min(agreeing / 3, 1) (allenai/aokvqa, eval_predictions.py).

    The official code compares answers as they are; here both sides go through the EvalAI processor, as an
    LLM's words do not come from the vocabulary that the official predictions are mapped to.
    """
    guess = evalai_normalise(prediction)
    return min([evalai_normalise(answer) for answer in answers].count(guess) / 3, 1.0)


def yes_no_word(answer: str) -> str | None:
    """`yes` or `no` by VLMEvalKit's rule (yorn.py): the one of the two that is among the words.

    None where neither is, or both are.
    """
    found = {"yes", "no"} & set(_without_punctuation(answer.lower()).split())
    return found.pop() if len(found) == 1 else None


def token_overlap(prediction: str, reference: str) -> tuple[float, float, float]:
    """F1, precision and recall of words after normalisation (LLaVA-Med, evaluate_metrics.py).

    Every occurrence in the prediction of a word that the reference has counts as found.
    """
    said, true = (Counter(_normal_words(text)) for text in (prediction, reference))
    found = sum(count for word, count in said.items() if word in true)
    if not found:
        return 0.0, 0.0, 0.0
    missed = sum(count for word, count in true.items() if word not in said)
    precision, recall = found / said.total(), found / (found + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def _leave_one_out(guess: str, truths: Sequence[str], *, numbered: bool = True) -> float:
    agreeing = truths.count(guess)
    left_out = 1 if numbered else agreeing
    others = [agreeing - left_out * (truth == guess) for truth in truths]
    return sum(min(count / 3, 1.0) for count in others) / len(truths) if truths else 0.0
