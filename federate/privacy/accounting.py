"""What Gaussian releases are worth, exactly: the curve of ε and δ, and composition in closed form.

A release adds N(0, m² S² I) to something that one protected unit can change by at most S; m is its noise
multiplier. Such a release is (ε, δ)-private for exactly the pairs with

    δ ≥ Φ(1 / 2m - ε m) - e^ε Φ(-1 / 2m - ε m)

(Balle and Wang, 2018, arXiv 1805.06530, theorem 8). Releases m_1, m_2, ... one after the other, each perhaps
chosen in the light of those before, are together as private as a single one with 1 / m² = Σ 1 / m_i² (Dong,
Roth and Su, 2022, arXiv 1905.02383, corollary 3.3). Nothing is gained by sampling here, so nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import exp, inf, log1p, sqrt

from scipy.special import log_ndtr

from fedcmp.pipeline.privacy import Privacy

_HALVINGS = 200


def delta_of(epsilon: float, multiplier: float) -> float:
    """Least δ of a release at `epsilon` ≥ 0; `multiplier` is positive."""
    above = log_ndtr(1 / (2 * multiplier) - epsilon * multiplier)
    below = epsilon + log_ndtr(-1 / (2 * multiplier) - epsilon * multiplier)
    # Equal up to rounding where there is next to no loss.
    return float(exp(above + log1p(-exp(below - above)))) if below < above else 0.0


def epsilon_of(multiplier: float, delta: float) -> float:
    """Least ε of a release at `delta`, rounded up; infinite without noise."""
    if multiplier <= 0:
        return inf
    return _least(lambda epsilon: delta_of(epsilon, multiplier) <= delta)


def multiplier_of(epsilon: float, delta: float) -> float:
    """Least noise multiplier of a release that is (ε, δ)-private, rounded up."""
    return _least(lambda multiplier: multiplier > 0 and delta_of(epsilon, multiplier) <= delta)


def composed(multipliers: Iterable[float]) -> float:
    """Noise multiplier of the one release that several are worth; infinite for none."""
    each = list(multipliers)
    if min(each, default=inf) <= 0:
        return 0.0
    precision = sum(multiplier**-2 for multiplier in each)
    return 1 / sqrt(precision) if precision else inf


def spent(multipliers: Iterable[float], delta: float) -> float:
    """ε of releases one after the other; 0 for none."""
    together = composed(multipliers)
    return 0.0 if together == inf else epsilon_of(together, delta)


def passes_of(turn: int, turns: int, passes: int) -> range:
    """Passes that a turn may have samples of, however many samples a pass has."""
    return range(passes * turn // turns, -(-passes * (turn + 1) // turns))


def resolved(options: Privacy, turns: int, passes: int = 1) -> Privacy:
    """Options with a noise multiplier in place of `epsilon`.

    Args:
        options: What was configured.
        turns: Rounds that a client takes part in at most. A client is in all of them, so its releases
            compose.
        passes: Passes over a silo. A text, an image or a patient is in one step of each.
    """
    if options.epsilon is None:
        return options
    multiplier = multiplier_of(options.epsilon, options.delta)
    multiplier *= sqrt(max(turns, 1) if options.unit == "client" else passes)
    return options.model_copy(update={"noise_multiplier": multiplier, "epsilon": None})


def _least(enough: Callable[[float], bool]) -> float:
    """Least number for which `enough` holds, on the side where it does; it holds for all greater ones."""
    low, high = 0.0, 1.0
    if enough(low):
        return low
    while not enough(high):
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
