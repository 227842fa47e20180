"""Steps in which texts, images or patients are private: gradients of units, clipped, summed and noised."""

from __future__ import annotations

import os
from collections import Counter
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import KEY
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from fedcmp.federate.arithmetic.updates import Objective, State
from fedcmp.federate.client.step import train_together
from fedcmp.federate.client.stream import Batch, Stream
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.privacy import noise, steps
from fedcmp.federate.privacy.noise import standard_normal
from fedcmp.federate.privacy.steps import NoisySteps, clipped_sum
from fedcmp.federate.privacy.units import UnitStream, unit_of
from fedcmp.pipeline.cache import CacheWriter, FeatureCache, Identity, Row
from fedcmp.pipeline.config import Optimizer
from fedcmp.pipeline.errors import DivergedError, UserError
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.models.prompts import IGNORE_INDEX
from fedcmp.pipeline.models.vision_language import VisionLanguage
from fedcmp.pipeline.options import Component
from fedcmp.pipeline.privacy import Privacy

PROJECTORS = [
    Component(name="linear"),
    Component(name="mlp2x_gelu"),
    Component(name="mlp3x_gelu"),
    Component.model_validate({"name": "pixel_shuffle_mlp", "scale": 2}),
    Component.model_validate({"name": "resampler", "queries": 3, "heads": 2}),
]
IDS = [component.name for component in PROJECTORS]
SGD = Optimizer(name="sgd", learning_rate=0.5, warmup=0, max_grad_norm=1e9)


def module(component: Component = PROJECTORS[1]) -> projectors.Projector:
    made = projectors.build(component, d_vision=24, d_llm=32)
    projectors.initialise(made, torch.Generator().manual_seed(0))
    return made


def drawn(
    component: Component, units: int, seed: int = 0
) -> tuple[projectors.Projector, torch.Tensor, torch.Tensor]:
    """A projector, features of units and gradients by their visual tokens."""
    generator = torch.Generator().manual_seed(seed)
    made = module(component)
    features = torch.randn(units, 4, 24, generator=generator)
    return made, features, torch.randn(made(features).shape, generator=generator)


def summed(
    made: projectors.Projector,
    features: torch.Tensor,
    visual: torch.Tensor,
    clip: float,
    units: torch.Tensor | None = None,
) -> State:
    """`clipped_sum`; by default every picture is a unit."""
    return clipped_sum(made, features, visual, torch.arange(len(features)) if units is None else units, clip)


def size(state: State) -> float:
    return sqrt(sum(float(each.double().square().sum()) for each in state.values()))


def minus(a: State, b: State) -> State:
    return {name: a[name] - b[name] for name in a}


@pytest.mark.parametrize("component", PROJECTORS, ids=IDS)
def test_unclipped_gradients_add_up_to_the_ordinary_one(component: Component) -> None:
    made, features, visual = drawn(component, 7)
    made(features).backward(visual)
    ordinary = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert size(minus(summed(made, features, visual, 1e9), ordinary)) < 1e-6 * size(ordinary)  # type: ignore[arg-type]


@pytest.mark.parametrize("component", PROJECTORS, ids=IDS)
def test_what_is_long_is_shortened_and_what_is_short_is_kept(component: Component) -> None:
    made, features, visual = drawn(component, 1)
    norm = size(summed(made, features, visual, 1e9))
    assert size(summed(made, features, visual, norm / 3)) == pytest.approx(norm / 3, rel=1e-9)
    assert size(summed(made, features, visual, 1.01 * norm)) == pytest.approx(norm, rel=1e-9)
    assert size(summed(made, features, 0 * visual, norm)) == 0


@given(
    component=st.sampled_from(PROJECTORS),
    seed=st.integers(0, 99),
    units=st.integers(1, 5),
    place=st.integers(0, 4),
    clip=st.sampled_from([1e-3, 1.0, 50.0]),
    scale=st.sampled_from([1e-4, 1.0, 1e6]),
)
@settings(max_examples=40, deadline=None)
def test_no_unit_moves_the_sum_by_more_than_the_clip(
    component: Component, seed: int, units: int, place: int, clip: float, scale: float
) -> None:
    """A blank in its place moves it by C, another unit by 2 C, however large its gradient is."""
    made, features, visual = drawn(component, units, seed)
    place %= units
    visual[place] *= scale
    whole = summed(made, features, visual, clip)
    blank, others = visual.clone(), [each for each in range(units) if each != place]
    blank[place] = 0
    without = summed(made, features, blank, clip)
    assert size(minus(whole, without)) <= clip * (1 + 1e-5)
    if others:
        removed = summed(made, features[others], visual[others], clip)
        assert size(minus(removed, without)) <= 1e-5 * clip * units
    other = features.clone()
    other[place] = torch.randn(4, 24, generator=torch.Generator().manual_seed(seed + 1))
    assert size(minus(whole, summed(made, other, -visual, clip))) <= 2 * units * clip * (1 + 1e-5)


@pytest.mark.parametrize("component", PROJECTORS, ids=IDS)
def test_memory_is_bounded_and_changes_nothing(component: Component, monkeypatch: pytest.MonkeyPatch) -> None:
    made, features, visual = drawn(component, 5)
    whole = summed(made, features, visual, 1.0)
    monkeypatch.setattr(steps, "_NUMBERS", 2 * sum(each.numel() for each in made.parameters()))
    assert size(minus(summed(made, features, visual, 1.0), whole)) < 1e-6


def test_a_gradient_that_is_no_number_is_refused() -> None:
    made, features, visual = drawn(PROJECTORS[1], 3)
    visual[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        NoisySteps(1.0, 1.0, 8).gradient(made, features, visual, torch.arange(len(features)))


def test_noise_is_standard_normal_and_never_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kstest(standard_normal((40_000,)).numpy(), "norm").pvalue > 1e-4
    assert standard_normal((3, 0)).shape == (3, 0)
    for byte in (b"\0", b"\xff"):
        monkeypatch.setattr(os, "urandom", lambda size, byte=byte: byte * size)
        assert bool(torch.isfinite(standard_normal((2, 3))).all())


def test_noise_is_the_systems_entropy_and_no_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = standard_normal((50,))
    torch.manual_seed(0)
    np.random.seed(0)
    assert not torch.equal(first, standard_normal((50,)))
    asked: list[int] = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes(range(8)) * (size // 8)

    monkeypatch.setattr(noise.os, "urandom", urandom)
    assert len(set(standard_normal((7,)).tolist())) == 1
    assert asked == [56]


@pytest.mark.parametrize("component", [PROJECTORS[1], PROJECTORS[4]], ids=[IDS[1], IDS[4]])
def test_the_noise_of_a_step_is_what_was_asked_for(component: Component) -> None:
    """Deviation m C / B on every parameter, whatever the gradients are."""
    made, features, visual = drawn(component, 3)
    clean = NoisySteps(0.5, 0.0, 8).gradient(made, features, visual, torch.arange(len(features)))
    assert size(minus(clean, {n: t / 8 for n, t in summed(made, features, visual, 0.5).items()})) < 1e-6
    noisy = NoisySteps(0.5, 3.0, 8).gradient(made, features, visual, torch.arange(len(features)))
    difference = torch.cat([(noisy[name] - clean[name]).flatten() for name in clean]).double()
    assert kstest((difference * 8 / (3.0 * 0.5)).numpy(), "norm").pvalue > 1e-4
    assert all(each.dtype == torch.float32 for each in noisy.values())


@pytest.fixture(scope="module")
def language(llama_dir: Path) -> FrozenLanguageModel:
    return FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")


PICTURES = 11


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """11 pictures with one to three texts each, four of which are there twice under other names."""
    rows = [
        Row(
            f"{number}.png",
            f"{number % PICTURES + 1:064x}",
            0,
            "",
            tuple(
                ("caption", "train", f"a red circle and {number} blue stars {'x' * text}")
                for text in range(1 + number % 3)
            ),
        )
        for number in range(PICTURES + 4)
    ]
    numbers = np.random.default_rng(5).standard_normal((PICTURES, 4, 24), np.float32)
    stored = numbers[[number % PICTURES for number in range(len(rows))]]
    path = tmp_path_factory.mktemp("caches") / "ward.zarr"
    layout = {"patches": 4, "d_vision": 24, "dtype": "float32", "shard_images": 32}
    writer = CacheWriter(path, Identity(KEY | {"dtype": "float32"}, {"files": "abc"}), **layout)
    writer.write(0, stored, rows)
    return writer.commit({"silo": "ward", "skipped": []})


# Pictures 1 and 10 to 14 are of patient "1", who has 1 and 12, the same picture, twice.
FIRST_DIGIT = r"^\d"
KINDS = ["text", "image", "patient"]


def stream_of(
    kind: str,
    cache: FeatureCache,
    language: FrozenLanguageModel,
    turns: int = 1,
    seed: int = 0,
    *,
    silos: tuple[str, ...] = ("ward",),
    patient: str = FIRST_DIGIT,
    most_texts: int = 16,
    passes: int = 1,
) -> Any:
    options: dict[str, Any] = {"template": "plain", "max_length": 99, "batch_size": 4, "passes": passes}
    caches = dict.fromkeys(silos, cache)
    if kind == "text":
        return Stream(caches, language, turns=turns, seed=seed, **options)
    own = {"patient": patient, "most_texts": most_texts} if kind == "patient" else {}
    unit = unit_of(Privacy.model_validate({"unit": kind, "clip": 1.0} | own))
    assert unit is not None
    return UnitStream(caches, language, unit=unit, turns=turns, seed=seed, **options)


def trained(
    stream: Stream,
    language: FrozenLanguageModel,
    noisy: NoisySteps | None,
    micro_batch: int = 3,
    **changes: object,
) -> LocalResult:
    job = Job(
        **{"client": "ward", "start": projectors.state_of(module()), "turn": 0, "round": 0, "rounds": 100}
        | changes
    )  # type: ignore[arg-type]
    (result,) = train_together(
        [job],
        [(stream.steps(0), stream.batches(0))],
        VisionLanguage(module(), language),
        SGD,
        micro_batch=micro_batch,
        advance=lambda number: None,
        noisy=noisy,
    )
    return result


class OneBatch(Stream):
    """The first batch of another stream."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def steps(self, turn: int) -> int:
        return 1

    def batches(self, turn: int):  # type: ignore[no-untyped-def]
        yield self.batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip", [1e9, 0.02])
@pytest.mark.parametrize("micro_batch", [1, 3, 99])
def test_a_step_is_the_mean_of_clipped_gradients_of_units(
    cache: FeatureCache, language: FrozenLanguageModel, kind: str, clip: float, micro_batch: int
) -> None:
    """By hand, a unit at a time, through transformers' own loss."""
    batch = max(stream_of(kind, cache, language).batches(0), key=lambda batch: len(batch.features))
    wants = frozenset({"gradient"})
    result = trained(OneBatch(batch), language, NoisySteps(clip, 0.0, 16), micro_batch, wants=wants)
    owners = torch.arange(len(batch.ids)) if batch.owners is None else batch.owners
    units = torch.arange(len(batch.features)) if batch.units is None else batch.units
    assert kind != "patient" or batch.size < len(batch.features)
    start = module()
    expected = {name: torch.zeros_like(each) for name, each in start.named_parameters()}
    norms = []
    for unit in range(batch.size):
        texts = (units[owners] == unit).nonzero().flatten().tolist()
        own = module()
        losses = []
        for text in texts:
            embeds = language.embed(batch.ids[[text]], own(batch.features[owners[[text]]]))
            losses.append(language.model(inputs_embeds=embeds, labels=batch.labels[[text]]).loss)
        torch.stack(losses).mean().backward()
        gradient = {name: each.grad for name, each in own.named_parameters()}
        norms.append(size(gradient))  # type: ignore[arg-type]
        for name, each in gradient.items():
            assert each is not None
            expected[name] += each * min(1, clip / norms[-1])
    assert clip > max(norms) or clip < min(norms)
    mean = {name: each / 16 for name, each in expected.items()}
    assert result.gradient is not None
    assert size(minus(result.gradient, mean)) < 1e-5 * size(mean)
    moved = {name: (each.detach() - result.state[name]) / 0.5 for name, each in start.named_parameters()}
    assert size(minus(moved, mean)) < 1e-6
    assert result.samples == batch.size


def test_private_steps_without_clip_or_noise_are_ordinary_ones(
    cache: FeatureCache, language: FrozenLanguageModel
) -> None:
    """Where all texts have as many tokens and the batch is as large as it says."""
    batch = next(stream_of("text", cache, language).batches(0))
    row = batch.labels[:1].expand(4, -1).clone()
    same = Batch(batch.features, batch.ids[:1].expand(4, -1).clone(), row)
    private = trained(OneBatch(same), language, NoisySteps(1e9, 0.0, 4)).state
    ordinary = trained(OneBatch(same), language, None).state
    start = projectors.state_of(module())
    assert size(minus(private, ordinary)) < 1e-5 * size(minus(start, ordinary))


@pytest.mark.parametrize("turns", [1, 3, 5])
def test_every_picture_is_in_one_step_with_all_its_texts(
    cache: FeatureCache, language: FrozenLanguageModel, turns: int
) -> None:
    stream = stream_of("image", cache, language, turns)
    assert stream.size == PICTURES
    seen: list[int] = []
    homes: dict[int, set[tuple[int, int]]] = {}
    hashes = [int(sha.tobytes().hex(), 16) for sha in cache.array("images/sha256")]
    for turn in range(turns):
        texts = iter(stream.samples(turn).tolist())
        batches = list(stream.batches(turn))
        assert len(batches) == stream.steps(turn)
        assert all(len(batch.features) <= 4 for batch in batches)
        for step, batch in enumerate(batches):
            assert batch.owners is not None
            for owner in batch.owners.tolist():
                _, text = next(texts)
                seen.append(text)
                row = cache.text_image[text]
                homes.setdefault(hashes[row], set()).add((turn, step))
                assert torch.equal(batch.features[owner], cache.tensor([row])[0])
    assert Counter(seen) == Counter(cache.usable_texts("train").tolist())
    assert len(homes) == PICTURES
    assert all(len(where) == 1 for where in homes.values())


def test_the_order_of_pictures_depends_on_their_number_alone(
    cache: FeatureCache, language: FrozenLanguageModel
) -> None:
    """A picture with other texts, or other pixels, is in the same step."""
    a, b = stream_of("image", cache, language), stream_of("image", cache, language)
    assert np.array_equal(a.samples(0), b.samples(0))
    firsts = [a._units[place][0][0][1] for place in a._order(0)]
    name = a._entropy[1]
    order = np.random.default_rng([0, name]).permutation(PICTURES)
    starts = np.unique(cache.text_image % PICTURES, return_index=True)[1]
    assert firsts == [int(starts[place]) for place in order]
    other = stream_of("image", cache, language, seed=1)
    assert not np.array_equal(a.samples(0), other.samples(0))
    with pytest.raises(UserError, match=r"ward: 11 different pictures do not fill its 12 rounds"):
        stream_of("image", cache, language, turns=12)


@pytest.mark.parametrize("kind", KINDS)
def test_clients_together_are_as_alone(cache: FeatureCache, language: FrozenLanguageModel, kind: str) -> None:
    noisy = NoisySteps(0.02, 0.0, 4)
    jobs = [Job(name, projectors.state_of(module()), 0, number, 9) for number, name in enumerate("ab")]
    streams = [stream_of(kind, cache, language, seed=seed) for seed in (0, 1)]
    together = train_together(
        jobs,
        [(stream.steps(0), stream.batches(0)) for stream in streams],
        VisionLanguage(module(), language),
        SGD,
        micro_batch=5,
        advance=lambda number: None,
        noisy=noisy,
    )
    for both, stream, job in zip(together, streams, jobs, strict=True):
        alone = trained(stream, language, noisy, 5, client=job.client, round=job.round, rounds=9)
        moved = minus(alone.state, job.start)
        assert size(minus(both.state, alone.state)) < 1e-4 * size(moved)


def test_objectives_act_on_private_gradients_as_on_others(
    cache: FeatureCache, language: FrozenLanguageModel
) -> None:
    batch = OneBatch(next(stream_of("text", cache, language).batches(0)))
    linear = {name: torch.full_like(each, 0.03) for name, each in projectors.state_of(module()).items()}
    wants = frozenset({"gradient"})
    plain = trained(batch, language, NoisySteps(0.02, 0.0, 4), wants=wants)
    shifted = trained(
        batch, language, NoisySteps(0.02, 0.0, 4), objective=Objective(linear=linear), wants=wants
    )
    assert size(minus(minus(plain.state, shifted.state), {n: 0.5 * t for n, t in linear.items()})) < 1e-5
    assert plain.gradient is not None
    assert shifted.gradient is not None
    assert size(minus(plain.gradient, shifted.gradient)) < 1e-7


def test_the_gradient_that_is_sent_is_the_noised_one(
    cache: FeatureCache, language: FrozenLanguageModel
) -> None:
    """SCAFFOLD's controls come from what the steps have moved by, noise included."""
    batch = OneBatch(next(stream_of("text", cache, language).batches(0)))
    result = trained(batch, language, NoisySteps(0.02, 5.0, 4), wants=frozenset({"gradient"}))
    assert result.gradient is not None
    moved = {name: (old - result.state[name]) / 0.5 for name, old in projectors.state_of(module()).items()}
    assert size(minus(moved, result.gradient)) < 1e-5 * size(moved)
    assert size(moved) > 0.5 * 5.0 * 0.02 / 4 * sqrt(sum(each.numel() for each in moved.values()))


def test_a_client_with_an_infinite_gradient_is_named(
    cache: FeatureCache, language: FrozenLanguageModel
) -> None:
    start = {
        name: torch.full_like(each, float("nan")) for name, each in projectors.state_of(module()).items()
    }
    with pytest.raises(DivergedError, match="client 'ward', round 0: a gradient is not finite"):
        trained(stream_of("text", cache, language), language, NoisySteps(1.0, 1.0, 4), start=start)


def test_supervised_tokens_are_counted_a_text() -> None:
    from fedcmp.federate.client.step import _tokens

    labels = torch.tensor([[IGNORE_INDEX, 3, 4, IGNORE_INDEX], [5, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])
    assert _tokens(labels).tolist() == [2, 1]


def patient_of(cache: FeatureCache, text: int) -> str:
    return cache.ids[cache.text_image[text]][0]


@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_patient_is_in_one_step_with_all_pictures_and_texts(
    cache: FeatureCache, language: FrozenLanguageModel, turns: int, seed: int
) -> None:
    stream = stream_of("patient", cache, language, turns, seed)
    assert stream.size == 10
    homes: dict[str, set[tuple[int, int, int]]] = {}
    seen: list[int] = []
    for turn in range(turns):
        texts = iter(stream.samples(turn).tolist())
        batches = list(stream.batches(turn))
        assert len(batches) == stream.steps(turn)
        for step, batch in enumerate(batches):
            assert batch.size <= 4
            assert batch.units.tolist() == sorted(batch.units.tolist())
            assert sorted(set(batch.units.tolist())) == list(range(batch.size))
            for owner in batch.owners.tolist():
                _, text = next(texts)
                seen.append(text)
                home = (turn, step, int(batch.units[owner]))
                homes.setdefault(patient_of(cache, text), set()).add(home)
                assert torch.equal(batch.features[owner], cache.tensor([cache.text_image[text]])[0])
    assert Counter(seen) == Counter(cache.usable_texts("train").tolist())
    assert len(homes) == 10
    assert all(len(home) == 1 for home in homes.values())
    assert len(set.union(*homes.values())) == 10


@given(
    component=st.sampled_from(PROJECTORS),
    seed=st.integers(0, 99),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    place=st.integers(0, 4),
    clip=st.sampled_from([1e-3, 1.0, 50.0]),
    at_once=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_patients_are_clipped_as_one_however_many_pictures_they_have(
    component: Component, seed: int, sizes: list[int], place: int, clip: float, at_once: int
) -> None:
    """By hand, a patient at a time; and to blank one of them moves the sum by the clip at most."""
    made, features, visual = drawn(component, sum(sizes), seed)
    units = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    place %= len(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "_NUMBERS", at_once * sum(each.numel() for each in made.parameters()))
        whole = summed(made, features, visual, clip, units)
        blank = visual.clone()
        blank[units == place] = 0
        assert size(minus(whole, summed(made, features, blank, clip, units))) <= clip * (1 + 1e-5)
    expected = {name: torch.zeros_like(each).double() for name, each in made.named_parameters()}
    for unit in range(len(sizes)):
        made.zero_grad()
        made(features[units == unit]).backward(visual[units == unit])
        gradient = {name: each.grad for name, each in made.named_parameters()}
        factor = min(1.0, clip / size(gradient))  # type: ignore[arg-type]
        for name, each in gradient.items():
            assert each is not None
            expected[name] += factor * each.double()
    assert size(minus(whole, expected)) < 1e-5 * size(expected)


def test_a_step_in_which_a_patient_is_blank_moves_by_the_clip_at_most(
    cache: FeatureCache, language: FrozenLanguageModel
) -> None:
    """Whole steps, through the LLM."""
    stream = stream_of("patient", cache, language)
    batch = next(each for each in stream.batches(0) if len(each.features) > each.size)
    clip, wants = 0.02, frozenset({"gradient"})
    whole = trained(OneBatch(batch), language, NoisySteps(clip, 0.0, 1), wants=wants)
    for unit in range(batch.size):
        others = batch.units[batch.owners] != unit
        blanked = Batch(
            batch.features, batch.ids[others], batch.labels[others], batch.owners[others], batch.units
        )
        without = trained(OneBatch(blanked), language, NoisySteps(clip, 0.0, 1), wants=wants)
        assert whole.gradient is not None
        assert without.gradient is not None
        moved = size(minus(whole.gradient, without.gradient))
        assert 0.9 * clip < moved <= clip * (1 + 1e-5)


def test_a_patient_with_many_texts_has_so_many_and_the_rest_is_counted(
    cache: FeatureCache, language: FrozenLanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = stream_of("patient", cache, language)
    assert everything.counts["ward"] == (30, 0)
    assert capsys.readouterr().out == ""
    bounded = stream_of("patient", cache, language, most_texts=3)
    said = " ".join(capsys.readouterr().out.split())
    taken = Counter(patient_of(cache, text) for _, text in bounded.samples(0).tolist())
    of_all = Counter(patient_of(cache, text) for text in cache.usable_texts("train").tolist())
    assert taken == {patient: min(number, 3) for patient, number in of_all.items()}
    left = sum(of_all.values()) - sum(taken.values())
    assert left > 0
    assert bounded.counts["ward"] == (30 - left, left)
    assert f"ward: {left} of 30 training texts are left out, as each patient has at most 3" in said
    again = stream_of("patient", cache, language, most_texts=3)
    assert np.array_equal(bounded.samples(0), again.samples(0))
    assert bounded.content(0) != everything.content(0)


def test_every_silo_has_patients_of_its_own(cache: FeatureCache, language: FrozenLanguageModel) -> None:
    assert stream_of("patient", cache, language, silos=("ward", "clinic")).size == 20
    assert stream_of("image", cache, language, silos=("ward", "clinic")).size == PICTURES


@pytest.mark.parametrize(
    ("pattern", "unnamed"), [("p\\d+", "0.png"), ("^1", "0.png"), ("x*", "0.png"), ("^1|(2)", "0.png")]
)
def test_a_record_of_no_patient_is_named(
    cache: FeatureCache, language: FrozenLanguageModel, pattern: str, unnamed: str
) -> None:
    with pytest.raises(UserError, match=rf"silo 'ward', image '{unnamed}': .* finds no patient in it; give"):
        stream_of("patient", cache, language, patient=pattern)


def test_a_group_is_the_patient_where_there_is_one(
    cache: FeatureCache, language: FrozenLanguageModel
) -> None:
    assert stream_of("patient", cache, language, patient=r"^(\d)\d*\.png").size == 10
    assert stream_of("patient", cache, language, patient=r"^\d\d*\.png").size == 15


@pytest.mark.parametrize(
    ("pattern", "said"),
    [(r"\d+", "15 pictures are each of a patient of its own"), ("png", "15 pictures are all of one patient")],
)
def test_patterns_that_find_something_else_than_patients_are_said(
    cache: FeatureCache,
    language: FrozenLanguageModel,
    capsys: pytest.CaptureFixture[str],
    pattern: str,
    said: str,
) -> None:
    stream_of("patient", cache, language, patient=pattern, most_texts=99)
    assert said in " ".join(capsys.readouterr().out.split())


def test_fewer_patients_than_rounds(
    cache: FeatureCache, language: FrozenLanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"ward: 10 patients do not fill its 11 rounds; lower"):
        stream_of("patient", cache, language, turns=11)
    assert "patient" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"ward: 1 patients do not fill its 2 rounds; lower"):
        stream_of("patient", cache, language, patient="png", turns=2)
    assert "15 pictures are all of one patient" in " ".join(capsys.readouterr().out.split())
