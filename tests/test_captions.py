"""Caption tokens and scores as Java's tokenizer and pycocoevalcap have them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from fedcmp.evaluate.official.captions import bleu, bleu_score, cider_d, rouge_l
from fedcmp.evaluate.official.ptb import caption_tokens

GOLDEN = json.loads((ROOT / "tests/data/captions.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("corpus", ["rules", "held back"])
def test_tokens_are_those_of_java(corpus: str) -> None:
    """`rules` are what the rules were written from; nobody looked at `held back` before they were."""
    assert len(GOLDEN[corpus]) > 100
    other = {
        text: caption_tokens(text)
        for text, tokens in GOLDEN[corpus]
        if caption_tokens(text) != tokens.split()
    }
    assert other == {}


def test_reports_full_of_brackets_score_as_officially() -> None:
    reports = GOLDEN["reports"]
    said = [caption_tokens(text) for text in reports["predictions"].values()]
    references = [
        [caption_tokens(text) for text in reports["references"][name]] for name in reports["predictions"]
    ]
    expected = reports["expected"]
    assert cider_d(said, references).mean() == pytest.approx(expected["CIDEr-D"], rel=1e-12)
    assert np.mean(list(map(rouge_l, said, references))) == pytest.approx(expected["ROUGE-L"], rel=1e-12)
    assert bleu_score(bleu(said, references).sum(0), 4) == pytest.approx(expected["BLEU-4"], rel=1e-12)


@given(st.text(max_size=80), st.sampled_from("().-'\"/@#&<>!? \u2019\u00ad5aA"))
def test_any_text_has_tokens_without_spaces(text: str, sign: str) -> None:
    for each in (text, sign * 3 + text, text + sign, sign.join(text.split())):
        for token in caption_tokens(each):
            assert token == token.lower().strip()
            assert token.split() == [token]
