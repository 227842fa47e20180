"""How long updates are, how long they should be, and how those are shortened that are too long.

After norm clipping (Sun et al., 2019, arXiv 1911.07963), whose limit is a constant; here it is relative to
the round, since updates shrink over a pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import fsum, sqrt
from statistics import median

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.lazy import Lazy
from fedcmp.federate.arithmetic.matrices import inner
from fedcmp.federate.arithmetic.updates import State, Update


def norm(start: State, state: Mapping[str, Tensor]) -> float:
    """‖D‖ of an update from `start` to `state`, over all parameters together."""
    deltas = (state[name] - old for name, old in start.items())
    return sqrt(fsum(inner(delta, delta) for delta in deltas))


def usual_norms(norms: Mapping[str, float], samples: Mapping[str, int]) -> dict[str, float]:
    """Norm that a round's clients would expect of each other, by client: the greater of two medians.

    One of all norms, and one for as many samples as the client has: local steps add up like a random
    walk, so that with ten times the data an honest update is about three times as long.

    Args:
        norms: Of their updates.
        samples: Which they trained on in this round.
    """
    of_all = median(norms.values())
    of_one = median(each / sqrt(samples[client]) for client, each in norms.items())
    return {client: max(of_all, of_one * sqrt(samples[client])) for client in norms}


def factors(norms: Mapping[str, float], usual: Mapping[str, float], longest: float) -> dict[str, float]:
    """1, or what gives an update its usual norm where it is more than `longest` times as long."""
    return {
        client: usual[client] / each if each > longest * usual[client] else 1.0
        for client, each in norms.items()
    }


def shortened(state: State, update: Update, factor: float) -> Update:
    """The update with W + s D_k in place of W_k; itself where s = 1."""
    if factor == 1:
        return update

    def moved(name: str) -> Tensor:
        old = state[name]
        return torch.lerp(old.double(), update.state[name].double(), factor).to(old.dtype)

    return replace(update, state=Lazy(state, moved))
