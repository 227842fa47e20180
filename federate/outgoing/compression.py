"""Updates in fewer bytes, with what was lost made up for in later rounds (error feedback).

A client sends C(D + e) in place of its update D and keeps e ← D + e - C(D + e): what was sent adds up to what
was learnt, but for the last e (Seide et al., 2014; Karimireddy et al., 2019, arXiv 1901.09847).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.bases import randomised_basis
from fedcmp.federate.arithmetic.updates import Sent, State
from fedcmp.pipeline.config import Communication

_LEVELS = 127


def compressed(update: State, options: Communication, seed: str) -> Sent:
    """C(X) of every parameter, as the tensors that travel.

    `bfloat16` halves the bytes; `int8` quarters them, with a scale for every row; `low_rank` sends U and
    Xᵀ U of matrices, U being about the leading left singular vectors (after PowerSGD, arXiv 1905.13727),
    and everything else as it is.

    Args:
        update: X, float32.
        options: How.
        seed: Of the random start that directions are sought from.
    """
    if options.payload == "low_rank":
        return {
            name: _low_rank(x, options.rank, zlib.crc32(f"{seed}/{name}".encode()))
            for name, x in update.items()
        }
    squeeze = _int8 if options.payload == "int8" else _bfloat16
    return {name: squeeze(x) for name, x in update.items()}


def restored(sent: Mapping[str, Mapping[str, Tensor]]) -> State:
    """What the tensors stand for, float32.

    Raises:
        KeyError: They are none of `compressed`.
    """
    return {name: _restored(parts) for name, parts in sent.items()}


def received(start: State, sent: Sent, client: str) -> State:
    """The projector of a client that started from `start`.

    Raises:
        ValueError: Naming the client whose update is not of the projector's shapes.
    """
    try:
        update = restored(sent)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"client '{client}' sent an update that cannot be restored ({error})") from None
    if {name: x.shape for name, x in update.items()} != {name: old.shape for name, old in start.items()}:
        raise ValueError(f"client '{client}' sent an update of other shapes than the projector's")
    return {name: old + update[name] for name, old in start.items()}


def _restored(parts: Mapping[str, Tensor]) -> Tensor:
    if "left" in parts:
        return parts["left"] @ parts["right"].T
    if "scale" in parts:
        return parts["levels"].float() * parts["scale"]
    return parts["whole"].float()


def _bfloat16(x: Tensor) -> dict[str, Tensor]:
    return {"whole": x.bfloat16()}


def _int8(x: Tensor) -> dict[str, Tensor]:
    """Multiples of the row's largest number / 127, rounded to the nearest."""
    scale = x.abs().amax(-1, keepdim=True) / _LEVELS
    levels = (x / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
    return {"levels": levels, "scale": scale}


def _low_rank(x: Tensor, rank: int, seed: int) -> dict[str, Tensor]:
    """Whole where that is no more, and where it is no matrix of numbers, which the server then refuses."""
    if x.ndim != 2 or rank * sum(x.shape) >= x.numel() or not bool(torch.isfinite(x).all()):
        return {"whole": x}
    start = torch.randn(x.shape[0], rank, generator=torch.Generator().manual_seed(seed))
    left, _ = randomised_basis(lambda right: x @ (x.T @ right), start)
    return {"left": left, "right": x.T @ left}
