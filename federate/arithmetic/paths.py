"""Updates along a client's mean gradient: what its data want, undistorted by its local optimiser.

AdamW scales every entry by itself, which changes a matrix's singular directions. The mean gradient along
the same path keeps them; only its length comes from the optimiser.
"""

from __future__ import annotations

import torch

from fedcmp.federate.arithmetic.updates import State


def path_projector(start: State, end: State, gradient: State) -> State:
    """W - ḡ ‖W_k - W‖ / ‖ḡ‖ of every parameter, in its dtype.

    Args:
        start: W, where the client started.
        end: W_k, where it ended.
        gradient: ḡ, its mean clipped gradient along the path, without terms of the objective. Where it is
            zero it has no direction, and W_k is kept.
    """
    return {name: _along(old, end[name], gradient[name]) for name, old in start.items()}


def _along(old: torch.Tensor, new: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    direction = gradient.double()
    length = float(direction.norm())
    if length == 0:
        return new
    moved = float((new.double() - old.double()).norm())
    return (old.double() - direction * (moved / length)).to(old.dtype)
