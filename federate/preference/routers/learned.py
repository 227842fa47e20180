"""The mixture that agrees best with a small public set of preferences."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from fedcmp.federate.preference.mixture import preference_loss
from fedcmp.federate.preference.routers import ROUTERS, Panel, Router
from fedcmp.pipeline.errors import UserError


@ROUTERS.register("learned")
class Learned(Router):
    """Minimises -log σ(Σ_k π_k Δr̃_k) + `decay` ‖Ω‖² / 2 over public preferences.

    Args:
        steps: Of Adam.
        learning_rate: Its learning rate.
        decay: Weight of ‖Ω‖² / 2.
    """

    steps: int = Field(200, ge=1)
    learning_rate: float = Field(0.05, gt=0)
    decay: float = Field(1e-2, ge=0)

    def fit(self, panel: Panel) -> Tensor:
        """One exchange with all sites."""
        h, margins = panel.margins()
        if not len(h):
            raise UserError(
                "align.router: 'learned' needs preferences in a silo of align.prompts, and "
                "there are none; add some, or use 'domain'"
            )
        if self.uniform == 1:
            raise UserError("align.router.uniform = 1: leaves nothing to learn; lower it, or use 'uniform'")
        omega = torch.zeros(len(panel.clients), panel.width, requires_grad=True)
        optimizer = torch.optim.Adam([omega], self.learning_rate)
        for _ in range(self.steps):
            optimizer.zero_grad()
            loss = preference_loss(omega, h, margins, uniform=self.uniform, temperature=self.temperature)
            (loss + self.decay / 2 * omega.square().sum()).backward()
            optimizer.step()
        return omega.detach()
