"""Whose prompt is it: softmax regression on the clients' own prompts, which stay where they are."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.preference.routers import ROUTERS, Panel, Router


@ROUTERS.register("domain")
class Domain(Router):
    """Clients send exact gradients of all their prompts, so the result is that of pooled training.

    Args:
        steps: Of Adam.
        learning_rate: Its learning rate.
        decay: Weight of ‖Ω‖² / 2.
    """

    wants_gradients = True
    uniform: float = Field(0.5, ge=0, le=1)
    steps: int = Field(60, ge=1)
    learning_rate: float = Field(0.1, gt=0)
    decay: float = Field(1e-4, ge=0)

    def fit(self, panel: Panel) -> Tensor:
        """One exchange with all sites a step."""
        omega = torch.zeros(len(panel.clients), panel.width)
        optimizer = torch.optim.Adam([omega], self.learning_rate)
        for _ in range(self.steps):
            gradient, _ = panel.domain_gradient(omega)
            omega.grad = gradient + self.decay * omega
            optimizer.step()
        return omega
