"""Gaussian noise that nobody can draw again, and a client's update under it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from fedcmp.federate.arithmetic.updates import State, distance
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.privacy import Privacy

# Standard deviations of noise in units of the last place of the float32 numbers that it is to hide.
LEAST_ULPS = 16
ULP = float(torch.finfo(torch.float32).eps)


def standard_normal(shape: Sequence[int]) -> Tensor:
    """Independent standard normal numbers, float64, from the system's entropy.

    Never from a seed or a generator with a state: who can draw the noise again can take it off. 52 random
    bits each go through the inverse of the normal distribution function.
    """
    bits = np.frombuffer(os.urandom(8 * prod(shape)), np.uint64) >> np.uint64(12)
    return torch.from_numpy(ndtri((bits + 0.5) * 2.0**-52)).reshape(tuple(shape))


def privatised(start: State, state: Mapping[str, Tensor], options: Privacy, clients: int) -> State:
    """W + D min(1, C / ‖D‖) + N(0, z² C² / K): the noise of a round's K clients adds up to z C.

    Args:
        start: W, where the client started.
        state: W + D, where it ended.
        options: C and z.
        clients: K.

    Raises:
        UserError: The noise would be lost in the rounding of the weights.
    """
    assert options.clip is not None
    norm = distance(state, start)
    factor = min(1.0, options.clip / norm) if norm > 0 else 1.0
    deviation = options.noise_multiplier * options.clip / clients**0.5
    noised = {}
    for name, old in start.items():
        if 0 < deviation < LEAST_ULPS * ULP * float(old.abs().max()):
            raise UserError(
                f"federate.privacy: noise of {deviation:.1e} would be lost in the rounding of weights up to "
                f"{float(old.abs().max()):.1e} in {name}; raise clip ({options.clip:g}) or the noise"
            )
        moved = old.double() + factor * (state[name].double() - old.double())
        if deviation:
            moved += deviation * standard_normal(old.shape)
        noised[name] = moved.to(old.dtype)
    return noised
