"""Every reward model counts alike."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcmp.federate.preference.routers import ROUTERS, Panel, Router


@ROUTERS.register("uniform")
class Uniform(Router):
    """π = 1 / K."""

    def fit(self, panel: Panel) -> Tensor:
        """Zeros."""
        return torch.zeros(len(panel.clients), panel.width)
