"""What a projector is: features of one picture to visual tokens in the LLM's embedding space."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Options
from fedcmp.pipeline.registry import Registry


class Projector(nn.Module):
    """A projector in memory: `(batch, patches, d_vision)` to `(batch, tokens(patches), d_llm)`.

    `architecture` is how files name it: its name, or JSON of the name and what is not default. `local` are
    beginnings of the names of what clients may keep to themselves, and `grows_from` an architecture that it
    can begin as.
    """

    architecture: str = ""
    local: ClassVar[tuple[str, ...]] = ()
    grows_from: ClassVar[str | None] = None

    def __init__(self, d_vision: int, d_llm: int) -> None:
        super().__init__()
        self.d_vision, self.d_llm = d_vision, d_llm

    def tokens(self, patches: int) -> int:
        """Visual tokens that a picture of `patches` cached patches takes in a prompt.

        Raises:
            UserError: The projector cannot take so many patches.
        """
        return patches

    def parts(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Visual tokens, and losses of its own by name, which are scalars."""
        return self(features), {}

    def leave_only(self, task: str | None) -> None:
        """Heed one task alone, or all; most projectors know no tasks."""

    def begin(self, pretrained: Mapping[str, Tensor] | None = None) -> None:
        """Go from drawn weights to those that training starts from, or from those of `grows_from`."""

    def completed(self, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A whole state from what is not `local`, as a client begins that has nothing of its own yet."""
        return dict(shared)


class Architecture(Options, ABC):
    """The options of a projector; `module` makes one."""

    @abstractmethod
    def module(self, d_vision: int, d_llm: int) -> Projector:
        """A projector with arbitrary weights.

        Raises:
            UserError: The options do not fit the widths.
        """

    @abstractmethod
    def widths(self, state: Mapping[str, Tensor]) -> tuple[int, int]:
        """`(d_vision, d_llm)` of saved weights.

        Raises:
            KeyError: The weights are of another architecture.
        """


def side_of(patches: int, scale: int) -> int:
    """Side of the square grid that `patches` form, divisible by `scale`.

    Raises:
        UserError: They form no such grid.
    """
    side = math.isqrt(patches)
    if side * side != patches or side % scale:
        raise UserError(
            f"federate.projector.scale = {scale}: {patches} cached patches do not form a square grid that it "
            "divides; choose another scale, or extract without the CLS token"
        )
    return side


PROJECTORS: Registry[Architecture] = Registry("projector", "fedcmp.pipeline.models.projectors")
