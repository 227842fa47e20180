"""Clipping, noise, and what they are worth."""

from __future__ import annotations

import json
from math import erf, exp, sqrt
from pathlib import Path

import pytest
import torch
from test_sites import SILOS, FakeLink, over, projector, sites_config  # noqa: F401
from test_strategies import draw

from federate.client import Job
from federate.engines.here import Here
from federate.engines.service import Service
from federate.history import distance
from federate.plan import plan
from federate.privacy import privatised, spent
from federate.run import run
from federate.strategies.fedavg import FedAvg
from pipeline.config import Privacy, load
from pipeline.errors import UserError
from pipeline.projector import state_of


def test_long_updates_are_shortened_and_short_ones_kept() -> None:
    start, state = draw(0), draw(1)
    norm = distance(state, start)
    short = privatised(start, state, Privacy(clip=norm / 4), 3)
    assert distance(short, start) == pytest.approx(norm / 4, rel=1e-5)
    for name in start:
        assert torch.allclose(short[name] - start[name], (state[name] - start[name]) / 4, atol=1e-6)
    kept = privatised(start, state, Privacy(clip=2 * norm), 3)
    assert all(torch.allclose(kept[name], state[name], atol=1e-6) for name in state)


def test_the_noise_of_all_clients_adds_up_to_the_multiplier() -> None:
    start = {"w": torch.zeros(200, 100)}
    options = Privacy(clip=0.5, noise_multiplier=3.0)
    noises = [privatised(start, start, options, 4)["w"] for _ in range(4)]
    assert sum(noises).std() == pytest.approx(1.5, rel=0.03)  # type: ignore[attr-defined]
    assert not torch.equal(noises[0], noises[1])


def delta_of(epsilon: float, multiplier: float) -> float:
    """δ of one Gaussian release, exactly (Balle and Wang, 2018, arXiv 1805.06530, theorem 8)."""

    def phi(x: float) -> float:
        return (1 + erf(x / sqrt(2))) / 2

    a, b = 1 / (2 * multiplier), epsilon * multiplier
    return phi(a - b) - exp(epsilon) * phi(-a - b)


@pytest.mark.parametrize("multiplier", [0.8, 2.0, 10.0])
def test_epsilon_covers_the_exact_one_and_is_not_far_above(multiplier: float) -> None:
    epsilon = spent([multiplier], 1e-5)
    assert delta_of(epsilon, multiplier) <= 1e-5
    assert delta_of(0.75 * epsilon, multiplier) > 1e-5


def test_four_releases_are_one_with_half_the_noise() -> None:
    assert spent([4.0] * 4, 1e-5) == pytest.approx(spent([2.0], 1e-5), rel=1e-6)
    assert spent([4.0] * 5, 1e-5) > spent([4.0] * 4, 1e-5)
    assert spent([4.0, 0.0], 1e-5) == float("inf")
    assert spent([], 1e-5) == 0


def whole_rows(path: Path) -> list[dict]:
    rows = map(json.loads, (path / "history.jsonl").read_text().splitlines())
    return [row for row in rows if row["client"] is None]


@pytest.mark.parametrize("secure", ["false", "true"])
def test_a_private_run_tells_what_it_has_spent(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
    secure: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["federate.privacy.clip=0.1", "federate.privacy.noise_multiplier=2.0", f"build={tmp_path}"]
    options += [f"federate.privacy.secure={secure}"]
    once, again = (load(sites_config, [*options, f"run={name}"]) for name in ("once", "again"))
    run(once)
    assert f"round 3: epsilon = {spent([2.0] * 3, 1e-5):.2f} at delta = 1e-05" in capsys.readouterr().out
    told = [row["epsilon"] for row in whole_rows(once.run_path)]
    assert told == pytest.approx([spent([2.0] * rounds, 1e-5) for rounds in (1, 2, 3)])
    run(again)
    assert projector(once) != projector(again)


def test_missing_noise_is_accounted_for(sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two of three clients bring two thirds of the noise's variance."""
    options = ["federate.privacy.clip=0.1", "federate.privacy.noise_multiplier=2.0", f"build={tmp_path}"]
    options += ["sites.quorum=2", "sites.round_timeout=1", "federate.rounds=1"]
    experiment = load(sites_config, options)
    link = FakeLink({node: Service(experiment, silo) for node, silo in enumerate(SILOS)})
    link.mute = {2: 1e9}
    run(experiment, over(link))
    (row,) = whole_rows(experiment.run_path)
    assert row["missing"] == ["practice"]
    assert row["epsilon"] == pytest.approx(spent([2.0 * sqrt(2 / 3)], 1e-5))


@pytest.mark.parametrize("kept", ["clip=0.1", "secure=true"])
def test_nothing_but_what_was_agreed_leaves_a_private_client(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
    kept: str,
) -> None:
    experiment = load(sites_config, [f"federate.privacy.{kept}", f"build={tmp_path}"])
    here = Here(experiment, plan(experiment, FedAvg()))
    with here.training(0) as train:
        start = state_of(train._engine.scratch)  # type: ignore[attr-defined]
        (result,) = train([Job("clinic", start, 0, 0, 3, wants=frozenset({"gradient"}))])
    assert result.gradient is None


def test_clipped_clients_count_alike(sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    experiment = load(sites_config, ["federate.privacy.clip=0.1", f"build={tmp_path}"])
    run(experiment)
    rows = map(json.loads, (experiment.run_path / "history.jsonl").read_text().splitlines())
    weights = [row["weight"] for row in rows if row["client"]]
    assert weights == pytest.approx([1 / 3] * 9)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federate.privacy.noise_multiplier=1.0"], "noise_multiplier needs clip"),
        (
            ["federate.privacy.clip=1.0", "federate.strategy.name=fedcmp"],
            "looks at more than the mean update",
        ),
    ],
)
def test_what_would_not_be_private_is_refused(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
    overrides: list[str],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        run(load(sites_config, [*overrides, f"build={tmp_path}"]))
