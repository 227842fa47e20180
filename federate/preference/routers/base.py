"""What a router is: it chooses the Ω of `mixture.weights`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

from pydantic import Field
from torch import Tensor

from fedcmp.pipeline.options import Options
from fedcmp.pipeline.registry import Registry


class Panel(Protocol):
    """Who judges, as a router sees them; every call asks the sites."""

    @property
    def clients(self) -> tuple[str, ...]:
        """Names, in the order of Ω's rows."""

    @property
    def width(self) -> int:
        """Features of a prompt."""

    @property
    def accuracies(self) -> Mapping[str, float | None]:
        """Share of its own held-out pairs that each ranks right, None without any."""

    def domain_gradient(self, omega: Tensor) -> tuple[Tensor, float]:
        """Of the mean of -log softmax(Ω h(x))_k over all own prompts, `(K, width)`, and that mean."""

    def margins(self) -> tuple[Tensor, Tensor]:
        """Public preferences: h(x) `(n, width)`, and each r̃(chosen) - r̃(rejected) `(K, n)`."""


class Router(Options, ABC):
    """π(x) = (1 - u) softmax(Ω h(x) / τ) + u / K, with u = `uniform` and τ = `temperature`.

    Sites answer `domain_gradient` only to a router that says that it `wants_gradients`.
    """

    wants_gradients: ClassVar[bool] = False
    uniform: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)

    @abstractmethod
    def fit(self, panel: Panel) -> Tensor:
        """Ω, `(K, width)` float32.

        Raises:
            UserError: There is nothing to fit it to.
        """


ROUTERS: Registry[Router] = Registry("router", "fedcmp.federate.preference.routers")
