"""One reward model alone: what a mixture is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcmp.federate.preference.routers import ROUTERS, Panel, Router
from fedcmp.pipeline.errors import UserError

# Times 1, the last feature of a prompt: exp(-1000) is zero.
_SURE = 1000.0


@ROUTERS.register("single")
class Single(Router):
    """π is 1 for one client.

    Args:
        silo: Which; by default the one that ranks most of its own held-out pairs right.
    """

    silo: str | None = None

    def fit(self, panel: Panel) -> Tensor:
        """All weight on the last feature, which is 1 for every prompt."""
        measured = {name: value for name, value in panel.accuracies.items() if value is not None}
        if self.silo is not None and self.silo not in panel.clients:
            raise UserError(f"align.router.silo = '{self.silo}': none of {', '.join(panel.clients)}")
        if self.silo is None and not measured:
            raise UserError(
                "align.router: no silo has held-out preferences to choose by; set align.router.silo"
            )
        best = self.silo or max(measured, key=lambda name: measured[name])
        omega = torch.zeros(len(panel.clients), panel.width)
        omega[panel.clients.index(best), -1] = _SURE * self.temperature
        return omega
