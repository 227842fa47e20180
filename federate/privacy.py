"""Client-level differential privacy: updates clipped and noised where they are made, ε accounted."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch

from federate.history import distance
from federate.strategies.base import State
from pipeline.config import Privacy
from pipeline.errors import UserError


def privatised(start: State, state: State, options: Privacy, clients: int) -> State:
    """W + D min(1, C / ‖D‖) + N(0, z² C² / K): the noise of a round's K clients adds up to z C.

    Args:
        start: W, where the client started.
        state: W + D, where it ended.
        options: C and z.
        clients: K.
    """
    assert options.clip is not None
    norm = distance(state, start)
    factor = min(1.0, options.clip / norm) if norm > 0 else 1.0
    deviation = options.noise_multiplier * options.clip / clients**0.5
    # From the system's entropy, never from the experiment's seed: who can draw the noise can take it off.
    generator = np.random.default_rng(secrets.randbits(128))
    noised = {}
    for name, old in start.items():
        noise = torch.from_numpy(generator.standard_normal(tuple(old.shape))) * deviation
        moved = old.double() + factor * (state[name].double() - old.double()) + noise
        noised[name] = moved.to(old.dtype)
    return noised


def spent(multipliers: Sequence[float], delta: float) -> float:
    """ε of Gaussian mechanisms one after the other, by Rényi differential privacy (Mironov, 2017).

    Args:
        multipliers: Noise over sensitivity of every release.
        delta: δ.

    Raises:
        UserError: The accountant is not installed.
    """
    if find_spec("opacus") is None:
        raise UserError("federate.privacy.noise_multiplier needs opacus; run pip install 'fedcmp[privacy]'")
    if min(multipliers, default=0.0) <= 0:
        return float("inf") if multipliers else 0.0
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for multiplier in multipliers:
        accountant.step(noise_multiplier=multiplier, sample_rate=1.0)
    return float(accountant.get_epsilon(delta))
