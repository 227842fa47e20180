"""Several passes over a silo: what is seen how often, in which order, and what stays as it was with one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_plan import plan
from test_privacy import IMAGES, PATIENTS, TEXTS, private, whole_rows  # noqa: F401
from test_sites import SILOS, FakeLink, over, sites_config  # noqa: F401

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.client.stream import Stream
from fedcmp.federate.engines.base import SiloCard, terms
from fedcmp.federate.engines.service import Service
from fedcmp.federate.privacy.accounting import multiplier_of, passes_of, resolved, spent
from fedcmp.federate.privacy.ledger import Ledger, total
from fedcmp.federate.privacy.units import UnitStream, unit_of
from fedcmp.federate.run import run
from fedcmp.federate.server import rounds as server
from fedcmp.pipeline.cache import FeatureCache, open_cache
from fedcmp.pipeline.config import Experiment, Federate
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.models.language import FrozenLanguageModel
from fedcmp.pipeline.privacy import Privacy

Make = Callable[..., Experiment]


@pytest.fixture(scope="module")
def clinic(extracted: Path) -> FeatureCache:
    """20 texts about as many pictures."""
    return FeatureCache(load(extracted).cache_path("clinic"))


@pytest.fixture(scope="module")
def language(llama_dir: Path) -> FrozenLanguageModel:
    return FrozenLanguageModel(llama_dir, dtype="float32", device="cpu")


def stream(
    cache: FeatureCache, language: FrozenLanguageModel, passes: int, turns: int, unit: str = "text"
) -> Stream:
    given = {"template": "plain", "max_length": 99, "batch_size": 4, "seed": 3}
    patient = {"patient": r"(\d)\.\w+$"} if unit == "patient" else {}
    what = unit_of(Privacy.model_validate({"unit": unit, "clip": 1.0, **patient}))
    if what is None:
        return Stream({"clinic": cache}, language, **given, turns=turns, passes=passes)  # type: ignore[arg-type]
    return UnitStream({"clinic": cache}, language, unit=what, **given, turns=turns, passes=passes)


@pytest.mark.parametrize("unit", ["text", "image", "patient"])
@pytest.mark.parametrize(("passes", "turns"), [(1, 3), (2, 1), (2, 3), (3, 2), (3, 7), (3, 30), (7, 2)])
def test_every_sample_is_in_one_step_of_every_pass(
    clinic: FeatureCache, language: FrozenLanguageModel, unit: str, passes: int, turns: int
) -> None:
    one = stream(clinic, language, passes, turns, unit)
    seen: list[int] = []
    orders: dict[int, list[int]] = {number: [] for number in range(passes)}
    for turn in range(turns):
        texts = iter(one.samples(turn)[:, 1].tolist())
        steps = [[next(texts) for _ in range(len(batch.ids))] for batch in one.batches(turn)]
        assert next(texts, None) is None
        assert len(steps) == one.steps(turn)
        assert all(len(set(step)) == len(step) for step in steps)
        seen += [text for step in steps for text in step]
        for number, places in one.parts(turn).items():
            assert len(places) > 0
            orders[number] += list(places)
    every = sorted(clinic.usable_texts("train").tolist())
    assert Counter(seen) == Counter(dict.fromkeys(every, passes))
    assert all(places == list(range(one.size)) for places in orders.values())
    passed = [seen[len(every) * number : len(every) * (number + 1)] for number in range(passes)]
    assert all(sorted(order) == every for order in passed)
    assert len(set(map(tuple, passed))) == passes


def test_one_pass_is_what_it_always_was(clinic: FeatureCache, language: FrozenLanguageModel) -> None:
    """The first of several is the only one of one, in the order that numpy gives to seed and name."""
    texts = np.array([[0, text] for text in clinic.usable_texts("train")])
    one, three = stream(clinic, language, 1, 1), stream(clinic, language, 3, 3)
    assert np.array_equal(one.samples(0), np.random.default_rng(one._entropy).permutation(texts))
    assert np.array_equal(three.samples(0), one.samples(0))
    assert three.content(0) == one.content(0) != three.content(1)
    assert [three.content(0, 0), three.content(1, 1)] == [three.content(0), three.content(1)]


@given(size=st.integers(1, 60), passes=st.integers(1, 6), data=st.data())
def test_turns_are_of_the_passes_that_accounting_expects(size: int, passes: int, data: st.DataObject) -> None:
    turns = data.draw(st.integers(1, size * passes))
    one = object.__new__(Stream)
    one._samples, one._passes, one._turns = np.zeros((size, 2)), passes, turns
    places = [
        (number, place) for turn in range(turns) for number, part in one.parts(turn).items() for place in part
    ]
    assert places == [(number, place) for number in range(passes) for place in range(size)]
    for turn in range(turns):
        assert set(one.parts(turn)) <= set(passes_of(turn, turns, passes))
    assert passes_of(turns - 1, turns, passes).stop == passes


def test_scarcity_counts_with_passes(clinic: FeatureCache, language: FrozenLanguageModel) -> None:
    stream(clinic, language, 2, 40)
    with pytest.raises(
        UserError, match=r"clinic: 20 training texts, 2 times each, do not fill its 41 rounds; "
    ):
        stream(clinic, language, 2, 41)
    with pytest.raises(
        UserError, match=r"20 training texts do not fill its 21 rounds; lower federate\.rounds, "
    ):
        stream(clinic, language, 1, 21)
    with pytest.raises(UserError, match=r"10 patients, 2 times each, do not fill .* raise federate\.passes"):
        stream(clinic, language, 2, 21, "patient")


def test_identities_hold_passes_only_where_there_are_several(extracted: Path) -> None:
    plain, one, two = (load(extracted, words) for words in ([], ["federate.passes=1"], ["federate.passes=2"]))
    card = SiloCard.of(open_cache(plain, "clinic"), plain)
    assert "passes" not in json.dumps([run_identity(plain), terms(plain, card)])
    assert run_identity(one) == run_identity(plain)
    assert run_identity(two)["federate"] == run_identity(plain)["federate"] | {"passes": 2}
    assert terms(two, card)["federate"]["passes"] == 2
    # What was in identities before there were passes, and nothing else.
    newer = {"passes", "adapter", "aggregation", "all_reduce", "shard", "micro_tokens"}
    assert set(plain.federate.as_identity()) == set(Federate.model_fields) - newer


def sha(experiment: Experiment) -> str:
    return json.loads((experiment.run_path / "manifest.json").read_text())["projectors"][
        "projector.safetensors"
    ]


def test_a_run_goes_on_in_the_middle_of_its_second_pass(
    extracted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["federate.passes=2", "federate.rounds=5"]
    whole, cut = (load(extracted, [*words, f"build={tmp_path}", f"run={name}"]) for name in ("whole", "cut"))
    run(whole)
    counted = server.usable

    def dies(jobs: list[object], *rest: object) -> object:
        if jobs[0].round == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return counted(jobs, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(server, "usable", dies)
        with pytest.raises(KeyboardInterrupt):
            run(cut)
    run(cut)
    assert sha(cut) == sha(whole)
    rows = [json.loads(line) for line in (whole.run_path / "history.jsonl").read_text().splitlines()]
    assert sum(row["samples"] for row in rows if row["client"] == "clinic") == 40
    once = load(extracted, ["federate.rounds=5", f"build={tmp_path}", "run=whole"])
    run(once)
    assert sha(once) != sha(cut)


def test_engines_agree(sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ["federate.passes=2", "federate.rounds=2", "sites.join_timeout=1", f"build={tmp_path}"]
    plain = load(sites_config, [*words, "run=here"])
    run(plain)
    sites = load(sites_config, [*words, "run=sites"])
    run(sites, over(FakeLink({n: Service(sites, silo) for n, silo in enumerate(SILOS)})))
    assert sha(sites) == sha(plain)
    other = load(sites_config, [*words, "run=other", "federate.passes=3"])
    with pytest.raises(UserError, match=r"federate\.passes"):
        run(other, over(FakeLink({n: Service(sites, silo) for n, silo in enumerate(SILOS)})))
    secure = load(sites_config, [*words, "run=secure", "federate.privacy.secure=true"])
    run(secure)
    ours, theirs = (load_file(each.run_path / "projector.safetensors") for each in (secure, plain))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)


def test_memoised_training_is_that_of_the_pass(extracted: Path, tmp_path: Path) -> None:
    """A run with a memo ends in the bytes of one without, whatever others have left in it."""
    words = [f"build={tmp_path}", "federate.rounds=4"]
    plain = load(extracted, [*words, "run=plain", "federate.passes=2"])
    run(plain)
    for passes in (1, 2, 2):
        memo = load(
            extracted, [*words, "run=memo", f"memo.path={tmp_path}/memo", f"federate.passes={passes}"]
        )
        run(memo)
    assert sha(memo) == sha(plain)


@pytest.mark.parametrize("options", [TEXTS, IMAGES, PATIENTS], ids=["text", "image", "patient"])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_what_is_private_is_released_once_a_pass(private: Make, options: list[str], rounds: int) -> None:  # noqa: F811
    """ε is that of the whole run, at the server, by the ledger, and by the noise that was drawn."""
    experiment = private(*options, "federate.passes=2", f"federate.rounds={rounds}")
    assert experiment.federate.clipped is not None
    noise = resolved(experiment.federate.clipped, rounds, 2).noise_multiplier
    assert noise == pytest.approx(sqrt(2) * multiplier_of(4.0, 1e-5))
    run(experiment)
    told = [row["epsilon"] for row in whole_rows(experiment)]
    begun = [passes_of(turn, rounds, 2).stop for turn in range(rounds)]
    assert told == pytest.approx([spent([noise] * number, 1e-5) for number in begun])
    assert told[-1] == pytest.approx(4.0)
    for silo in SILOS:
        releases = Ledger(experiment.ledger).releases(open_cache(experiment, silo).content)
        assert len(releases) == rounds + rounds % 2
        assert total(releases) == pytest.approx(noise / sqrt(2))


def test_a_budget_for_one_pass_is_too_small_for_two(private: Make, tmp_path: Path) -> None:  # noqa: F811
    noise = f"federate.privacy.noise_multiplier={multiplier_of(4.0, 1e-5)}"
    words = [*TEXTS[:2], noise, "ledger.epsilon=4.001", "federate.rounds=2"]
    run(private(*words, "run=one"))
    experiment = private(*words, "run=two", "federate.passes=2", f"ledger.path={tmp_path}/another")
    with pytest.raises(UserError, match=r"more than ledger\.epsilon = 4"):
        run(experiment)


def test_a_round_of_two_passes_that_is_done_again_counts_for_both(
    private: Make,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experiment = private(*TEXTS, "federate.passes=2", "federate.rounds=3")
    counted = server.usable

    def dies(jobs: list[object], results: Iterable[object], *rest: object) -> object:
        if jobs[0].round == 1:  # type: ignore[attr-defined]
            assert len(list(results)) == 3
            raise KeyboardInterrupt
        return counted(jobs, results, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(server, "usable", dies)
        with pytest.raises(KeyboardInterrupt):
            run(experiment)
    run(experiment)
    m = multiplier_of(4.0, 1e-5)
    releases = Ledger(experiment.ledger).releases(open_cache(experiment, "clinic").content)
    assert total(releases) == pytest.approx(m / sqrt(2))
    assert whole_rows(experiment)[-1]["epsilon"] == pytest.approx(spent([m / sqrt(2)], 1e-5))


def test_clients_are_private_whatever_the_passes() -> None:
    options = Privacy(clip=1.0, epsilon=4.0)
    assert resolved(options, 6, 3) == resolved(options, 6)


def test_plan_and_show_count_passes() -> None:
    config = str(ROOT / "configs/qwen-0.5b.toml")
    once, thrice = plan(config), plan(config, "--set", "federate.passes=3")
    assert "3 passes" in thrice
    hours = [
        float(next(line for line in shown.splitlines() if "(configured)" in line).split("│")[6].split()[0])
        for shown in (once, thrice)
    ]
    assert hours[1] == pytest.approx(3 * hours[0], rel=0.05)
    shown = CliRunner().invoke(main, ["show", config]).output
    assert "passes = 1" in shown


@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_passes_are_a_whole_number(extracted: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"federate\.passes = "):
        load(extracted, [f"federate.passes={value}"])
