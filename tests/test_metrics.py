"""Metrics and intervals beyond the golden cases: properties, corners, coverage."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.evaluate.benchmarks.base import Item, averaged
from fedcmp.evaluate.benchmarks.pope import Pope
from fedcmp.evaluate.compare import DRAWS
from fedcmp.evaluate.metric import Metric, mean
from fedcmp.evaluate.official.captions import object_matches
from fedcmp.evaluate.official.ptb import caption_tokens
from fedcmp.evaluate.official.short_answers import pope_label, vqa_accuracy, vqa_normalise
from fedcmp.evaluate.statistics import bootstrap, gap, holm, interval, pooled
from fedcmp.pipeline.models.prompts import question


@pytest.mark.parametrize(
    ("word", "normal"),
    [("dont", "don't"), ("couldntve", "couldntve"), ("couldn'tve", "couldn't've"), ("The 2 Dogs.", "2 dogs")],
)
def test_vqa_normalise_contractions(word: str, normal: str) -> None:
    assert vqa_normalise(word) == normal


@given(st.text(max_size=60))
def test_parsers_take_any_text(text: str) -> None:
    assert pope_label(text) in ("yes", "no")
    assert isinstance(vqa_normalise(text), str)
    assert all(token.strip() for token in caption_tokens(text))
    assert 0 <= vqa_accuracy(text, ["yes"] * 5 + ["no"] * 5) <= 1


def test_object_matches_are_multisets_and_take_the_best_reference() -> None:
    pattern = re.compile("Red (star|ring)|blue star", re.IGNORECASE)
    said = "A red star, a red star and a BLUE star"
    assert object_matches(said, ["a red star near a red ring"], pattern) == (1, 3, 2)
    assert object_matches(said, ["a red ring", "red star, blue star"], pattern) == (2, 3, 2)
    assert object_matches("", ["nothing"], pattern) == (0, 0, 0)


def test_an_always_no_model_scores_without_dividing_by_zero(tmp_path) -> None:  # type: ignore[no-untyped-def]
    items = [Item(f"random/{n}", str(n), question("?"), ("yes", "no")[n % 2]) for n in range(4)]
    metrics = Pope(questions={"random": tmp_path}).score(items, {item.id: "No" for item in items})
    score = interval(metrics["f1"], np.random.default_rng(0), 100)
    assert (score.value, score.low, score.high) == (0.0, 0.0, 0.0)


def test_mean_f1_is_the_mean_over_splits(tmp_path) -> None:  # type: ignore[no-untyped-def]
    benchmark = Pope(questions={"random": tmp_path, "popular": tmp_path})
    items = [
        Item(f"{split}/{n}", str(n), question("?"), ("yes", "no")[n % 2])
        for split in ("random", "popular")
        for n in range(4)
    ]
    answers = {item.id: item.truth if item.id.startswith("random") else "no" for item in items}
    metrics = benchmark.score(items, answers)
    values = {name: float(metric.value(metric.statistics.sum(0))) for name, metric in metrics.items()}
    assert (values["f1 random"], values["f1 popular"], values["f1"]) == (1.0, 0.0, 0.5)
    assert (values["accuracy"], values["accuracy popular"]) == (0.75, 0.5)


def test_the_interval_resamples_images_not_questions() -> None:
    """Six copies of every question must not narrow the interval."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 300).astype(float)
    single = averaged([Item(str(n), str(n), question("?")) for n in range(300)], values.tolist())
    copied = averaged(
        [Item(f"{n}.{k}", str(n), question("?")) for n in range(300) for k in range(6)],
        np.repeat(values, 6).tolist(),
    )
    ours = interval(single, np.random.default_rng(1), 4000)
    assert ours == interval(single, np.random.default_rng(1), 4000)
    theirs = interval(copied, np.random.default_rng(1), 4000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    standard_error = values.std() / np.sqrt(300)
    assert ours.high - ours.low == pytest.approx(2 * 1.96 * standard_error, rel=0.08)


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = (rng.random(80) < 0.7).astype(float)
        metric = averaged([Item(str(n), str(n), question("?")) for n in range(80)], values.tolist())
        score = interval(metric, np.random.default_rng(trial), 400)
        covered += score.low <= 0.7 <= score.high
    assert 0.90 <= covered / 200 <= 0.99


@settings(max_examples=20)
@given(st.lists(st.lists(st.floats(0, 1), min_size=4, max_size=4), min_size=1, max_size=4))
def test_pooling_averages_projectors(values: list[list[float]]) -> None:
    metrics = [
        Metric(["a", "b", "b", "c"], np.array([[value, 1.0] for value in each]), mean) for each in values
    ]
    together = pooled(metrics)
    expected = np.mean(values)
    assert float(together.value(together.statistics.sum(0))) == pytest.approx(float(expected))


def paired_scores(rng: np.random.Generator, better: float) -> tuple[Metric, Metric]:
    """Two runs on the same 120 images, two questions each; they mostly agree."""
    easy = rng.random(120).repeat(2)
    images = [str(n) for n in range(120) for _ in range(2)]
    noise = rng.normal(0, 0.15, (2, 240))
    one, other = (easy + noise[0] + better > 0.5).astype(float), (easy + noise[1] > 0.5).astype(float)
    return averaged([], one.tolist(), images), averaged([], other.tolist(), images)


def test_the_paired_bootstrap_keeps_its_level_and_finds_differences() -> None:
    rng = np.random.default_rng(0)
    level, power, narrower = 0, 0, 0
    for trial in range(150):
        generator = np.random.default_rng(trial)
        one, other = paired_scores(rng, 0.0)
        same = gap([one], [other], generator, 300)
        level += same.p < 0.05
        alone = interval(one, generator, 300)
        narrower += same.high - same.low < alone.high - alone.low
        power += gap(*[[each] for each in paired_scores(rng, 0.2)], generator, 300).p < 0.05
    assert level / 150 < 0.1
    assert power / 150 > 0.9
    assert narrower / 150 > 0.95


@pytest.mark.parametrize("kinds", [3, 10_000])
@pytest.mark.parametrize("parts", [1, 4])
def test_merged_draws_have_the_same_distribution(kinds: int, parts: int) -> None:
    """Images that are alike are drawn together; nearly all different ones by their places."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, kinds, 400) / kinds
    strata = [str(n % parts) for n in range(400)]
    one = Metric([str(n) for n in range(400)], np.stack([values, np.ones(400)], 1), mean, strata)
    other = Metric(one.images, np.stack([values[::-1] ** 2, np.ones(400)], 1), mean, strata)
    plain, merged = (
        bootstrap([one, other], np.random.default_rng(seed), 20_000, merge=merge)
        for seed, merge in ((1, False), (2, True))
    )
    assert plain.shape == merged.shape == (2, 20_000)
    np.testing.assert_allclose(plain.mean(1), merged.mean(1), atol=4 * plain.std(1).max() / 20_000**0.5)
    np.testing.assert_allclose(plain.std(1), merged.std(1), rtol=0.03)
    assert np.corrcoef(plain)[0, 1] == pytest.approx(np.corrcoef(merged)[0, 1], abs=0.03)


def test_p_has_the_floor_that_is_documented() -> None:
    ones, zeros = (averaged([], [value] * 50, [str(n) for n in range(50)]) for value in (1.0, 0.0))
    assert gap([ones], [zeros], np.random.default_rng(0), 20_000).p == pytest.approx(2 / 20_001)
    assert DRAWS >= 20_000
    assert max(holm([2 / (DRAWS + 1)] * 50)) < 0.05


def test_several_seeds_are_averaged_by_score_not_by_count() -> None:
    def f1_like(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] ** 2 / 16

    metrics = [Metric(["a", "b"], np.array([[value], [value]]), f1_like) for value in (1.0, 2.0)]
    nothing = Metric(["a", "b"], np.zeros((2, 1)), f1_like)
    found = gap(metrics, [nothing, nothing], np.random.default_rng(0), 100)
    assert found.value == pytest.approx((0.25 + 1.0) / 2)


def test_images_are_resampled_within_their_stratum() -> None:
    def first(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0]

    statistics = np.array([[1.0]] * 5 + [[0.0]] * 5)
    images, strata = [str(n) for n in range(10)], ["a"] * 5 + ["b"] * 5
    free = interval(Metric(images, statistics, first), np.random.default_rng(0), 300)
    held = interval(Metric(images, statistics, first, strata), np.random.default_rng(0), 300)
    assert free.low < 5 < free.high
    assert (held.low, held.high) == (5, 5)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(max_size=80), st.text("ABCDEZ .,()*", max_size=12), st.from_regex(r"[Tt]he answer is .*")
    ),
    st.dictionaries(st.sampled_from("ABCD"), st.text(min_size=1, max_size=9), min_size=1),
)
def test_letters_are_found_or_not_but_never_made_up(text: str, choices: dict[str, str]) -> None:
    from fedcmp.evaluate.official.short_answers import mmbench_option, scienceqa_letter

    letter = mmbench_option(text, choices)
    assert letter is None or letter == "Z" or letter in choices
    if letter in choices:
        assert letter in text.upper() or choices[letter].lower() in text.lower()
    parsed = scienceqa_letter(text)
    assert parsed is None or parsed in text
    for each in choices:
        assert mmbench_option(f"{each}.", choices) == each
        assert mmbench_option(each, choices) == each


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.lists(st.text(max_size=12), min_size=10, max_size=10))
def test_yes_no_and_vqa_rules_take_any_text(text: str, truths: list[str]) -> None:
    from fedcmp.evaluate.official.short_answers import (
        gqa_answer,
        mme_label,
        textvqa_accuracy,
        vizwiz_accuracy,
        vqa_normalise,
    )

    label = mme_label(text)
    assert label == "other" or label in text.lower()[:4]
    assert not gqa_answer(text).endswith(".")
    for accuracy in (textvqa_accuracy, vizwiz_accuracy):
        assert 0 <= accuracy(text, truths) <= 1
    assert textvqa_accuracy(truths[0], [truths[0]] * 10) == 1
    assert " " * 2 not in vqa_normalise(text)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from("a b c d".split()), max_size=7),
    st.lists(st.sampled_from("a b c".split()), max_size=7),
)
def test_caption_scores_are_bounded_and_full_for_the_reference(said: list[str], reference: list[str]) -> None:
    from fedcmp.evaluate.official.captions import bleu, bleu_score, rouge_l

    assert 0 <= rouge_l(said, [reference]) <= 1.0000001
    assert rouge_l(reference, [reference]) == pytest.approx(1)
    if said and reference:
        for size in range(1, 5):
            assert 0 <= bleu_score(bleu([said], [[reference]])[0], size) <= 1.0000001
