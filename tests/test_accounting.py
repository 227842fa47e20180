"""What noise is worth: the exact curve, composition, and Opacus's opinion."""

from __future__ import annotations

from math import erf, exp, inf, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.federate.privacy.accounting import composed, delta_of, epsilon_of, multiplier_of, resolved, spent
from fedcmp.pipeline.privacy import Privacy


def exact(epsilon: float, multiplier: float) -> float:
    """Balle and Wang's theorem 8, written plainly."""

    def phi(x: float) -> float:
        return (1 + erf(x / sqrt(2))) / 2

    a, b = 1 / (2 * multiplier), epsilon * multiplier
    return phi(a - b) - exp(epsilon) * phi(-a - b)


@given(multiplier=st.floats(0.3, 20), epsilon=st.floats(0, 10))
def test_delta_is_the_theorems(multiplier: float, epsilon: float) -> None:
    assert delta_of(epsilon, multiplier) == pytest.approx(exact(epsilon, multiplier), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "multiplier"), [(8.0, 0.60), (4.0, 1.08), (1.0, 3.73)])
def test_known_pairs_at_a_hundred_thousandth(epsilon: float, multiplier: float) -> None:
    assert multiplier_of(epsilon, 1e-5) == pytest.approx(multiplier, abs=0.005)


@given(multiplier=st.floats(0.01, 1e4), delta=st.floats(1e-12, 0.3))
@settings(max_examples=60, deadline=None)
def test_epsilon_is_the_least_that_holds(multiplier: float, delta: float) -> None:
    """On the safe side, and not a millionth further."""
    epsilon = epsilon_of(multiplier, delta)
    assert delta_of(epsilon, multiplier) <= delta
    if epsilon > 1e-6:
        assert delta_of(epsilon * (1 - 1e-6), multiplier) > delta
        assert multiplier_of(epsilon, delta) == pytest.approx(multiplier, rel=1e-5)
        assert delta_of(epsilon, multiplier_of(epsilon, delta)) <= delta


def test_limits() -> None:
    assert epsilon_of(0.0, 1e-5) == inf
    assert epsilon_of(1e9, 1e-5) == 0.0
    assert spent([], 1e-5) == 0.0
    assert spent([4.0, 0.0], 1e-5) == inf
    assert composed([]) == inf
    assert spent([inf], 1e-5) == 0.0


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=8))
def test_releases_compose_by_their_precisions(multipliers: list[float]) -> None:
    assert composed(multipliers) ** -2 == pytest.approx(sum(each**-2 for each in multipliers))
    assert composed([2 * each for each in multipliers]) == pytest.approx(2 * composed(multipliers))


def test_four_releases_are_one_with_half_the_noise() -> None:
    assert spent([4.0] * 4, 1e-5) == pytest.approx(spent([2.0], 1e-5), rel=1e-12)
    assert spent([4.0] * 5, 1e-5) > spent([4.0] * 4, 1e-5)


@pytest.mark.parametrize("multipliers", [[0.8], [2.0], [10.0], [2.0] * 3, [5.0] * 12, [3.0, 4.0, 7.0]])
def test_opacus_agrees_from_above(multipliers: list[float]) -> None:
    """Its Rényi accountant bounds the same releases, and is not far above."""
    accountants = pytest.importorskip("opacus.accountants")
    rdp = accountants.RDPAccountant()
    for multiplier in multipliers:
        rdp.step(noise_multiplier=multiplier, sample_rate=1.0)
    ours, theirs = spent(multipliers, 1e-5), rdp.get_epsilon(1e-5)
    assert ours <= theirs <= 1.25 * ours


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # opacus' own
@pytest.mark.parametrize("multipliers", [[1.0], [2.0] * 3])
def test_opacus_agrees_numerically(multipliers: list[float]) -> None:
    """Its accountant of privacy loss distributions has our number between its own and its error."""
    accountants = pytest.importorskip("opacus.accountants")
    prv = accountants.PRVAccountant()
    for multiplier in multipliers:
        prv.step(noise_multiplier=multiplier, sample_rate=1.0)
    theirs = prv.get_epsilon(delta=1e-5, eps_error=0.01, delta_error=1e-8)
    assert theirs == pytest.approx(spent(multipliers, 1e-5), abs=0.03)


def test_noise_is_found_for_what_an_epsilon_is_to_be() -> None:
    """A text is in one round, a client in all of its."""
    text = resolved(Privacy(unit="text", clip=1.0, epsilon=4.0), 12)
    client = resolved(Privacy(clip=1.0, epsilon=4.0), 12)
    assert text.epsilon is client.epsilon is None
    assert spent([text.noise_multiplier], 1e-5) == pytest.approx(4.0)
    assert spent([client.noise_multiplier] * 12, 1e-5) == pytest.approx(4.0)
    given_noise = Privacy(clip=1.0, noise_multiplier=2.0)
    assert resolved(given_noise, 12) == given_noise
