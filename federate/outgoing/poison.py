"""Sites that send something else than what they learnt, for research on what strategies withstand."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import State, distance
from fedcmp.pipeline.config import Poison


def poisoned(
    start: State, state: Mapping[str, Tensor], options: Poison, seed: int, client: str, round_: int
) -> Mapping[str, Tensor]:
    """What a bad site sends in place of its projector.

    `scaled` multiplies its update, `sign_flipped` turns it round and multiplies it, `random` sends noise
    of its update's norm, multiplied, and `not_finite` no numbers. Bad captions act in training and change
    nothing here.

    Args:
        start: Where it started.
        state: Where it ended.
        options: What kind of site it is.
        seed: Seed of the experiment.
        client: Its name.
        round_: Round of the run.
    """
    if options.kind == "captions":
        return state
    if options.kind == "not_finite":
        return {name: torch.full_like(old, torch.nan) for name, old in start.items()}
    update = {name: state[name] - old for name, old in start.items()}
    if options.kind == "random":
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{client}/{round_}".encode()))
        noise = {name: torch.randn(old.shape, generator=generator) for name, old in start.items()}
        zero = {name: torch.zeros_like(old) for name, old in start.items()}
        size = distance(state, start) / distance(noise, zero)
        update = {name: size * each for name, each in noise.items()}
    factor = -options.scale if options.kind == "sign_flipped" else options.scale
    return {name: old + factor * update[name] for name, old in start.items()}
