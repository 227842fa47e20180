"""What a client adds to a secure sum, and what it says about itself; the arithmetic is the strategies'."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedcmp.federate.arithmetic.cohort import Side
from fedcmp.federate.arithmetic.matrices import Matrices, agreement_with
from fedcmp.federate.arithmetic.norms import norm
from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.secure.numbers import LEAST

Place = tuple[Side, str]


class Own:
    """A client's update, which stays with it.

    Args:
        name: The client.
        start: Projector it started from.
        state: Projector it ended with.
    """

    def __init__(self, name: str, start: State, state: Mapping[str, Tensor]) -> None:
        self._name, self._start, self._state = name, start, state

    def contribute(self, request: Mapping[str, Any]) -> np.ndarray:
        """Weighted updates, then weighted Gram matrices, one after the other as a vector, float64.

        Raises:
            ValueError: The sum would be nearly this client's own.
        """
        self.permit(request)
        parts = [weights[self._name] * self._delta(name) for name, weights in request["updates"].items()]
        parts += [
            self._side(side, name).gram({self._name: weights[self._name]}).double()
            for side, matrices in request["grams"].items()
            for name, weights in matrices.items()
        ]
        return torch.cat([part.flatten() for part in parts]).numpy()

    def permit(self, request: Mapping[str, Any], survivors: Collection[str] | None = None) -> None:
        """Refuse a sum that is hardly more than this client's update.

        Args:
            request: What is asked for.
            survivors: Who is in the sum; all whom it names by default.

        Raises:
            ValueError: Fewer than three have a weight, or this client has more than half of all.
        """
        grams = [named for matrices in request["grams"].values() for named in matrices.items()]
        for name, weights in [*request["updates"].items(), *grams]:
            among = {client: weights[client] for client in survivors or weights}
            if not all(isfinite(weight) and weight >= 0 for weight in among.values()):
                raise ValueError(f"client '{self._name}' refuses weights of {name} that are none")
            if sum(weight > 0 for weight in among.values()) < LEAST:
                raise ValueError(
                    f"client '{self._name}' refuses a sum of {name} over fewer than {LEAST} clients"
                )
            if among[self._name] > sum(among.values()) / 2:
                raise ValueError(
                    f"client '{self._name}' refuses a sum of {name} of which more than half would be its own"
                )

    def norm(self) -> float:
        """Of its update, over all parameters together."""
        return norm(self._start, self._state)

    def agreements(self, totals: Mapping[str, Tensor], share: float) -> dict[str, float]:
        """Cosine of every D_k with the others' consensus, from the broadcast Σ_j p_j D_j."""
        own = {self._name: share}
        return {
            name: agreement_with(total, self._matrix(name), own)[self._name] for name, total in totals.items()
        }

    def _matrix(self, name: str) -> Matrices:
        return Matrices({self._name: self._state[name]}, self._start[name])

    def _side(self, side: Side, name: str) -> Matrices:
        return self._matrix(name) if side == "left" else self._matrix(name).transposed

    def _delta(self, name: str) -> Tensor:
        return self._state[name].double() - self._start[name].double()


def parts_of(
    vector: np.ndarray, state: State, updates: Sequence[str], grams: Sequence[Place]
) -> tuple[State, dict[Place, Tensor]]:
    """The sums in a vector that `contribute` made, by name; Gram matrices by side and name."""
    shapes = [state[name].shape for name in updates]
    shapes += [torch.Size((state[name].shape[0 if side == "left" else 1],) * 2) for side, name in grams]
    pieces = torch.from_numpy(vector).split([shape.numel() for shape in shapes])
    tensors = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    return dict(zip(updates, tensors, strict=False)), dict(zip(grams, tensors[len(updates) :], strict=True))
