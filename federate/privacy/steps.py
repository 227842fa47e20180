"""Local steps under which every text, or every image or patient with all its texts, is private.

A step moves by (Σ_u g_u min(1, C / ‖g_u‖) + N(0, m² C² I)) / B, over the units u of its batch: texts, or
images or patients with all their texts. g_u is the gradient of the mean loss of u's texts, over all
parameters together, and B the configured batch size, which is public.

**What it protects.** Two silos are neighbours if one of them has, in place of one unit of the other, a blank
that has no gradient (zero-out adjacency). How many units there are, and thus which step each is in, is
public, as is how many texts they have together. **Claim:** all that a silo sends in a pass is worth one
Gaussian release of multiplier m. *Proof.* A pass goes over the units once, in an order that depends on their
number and its own alone, and no step takes units of two passes, so u is in exactly one step of it. Steps
before it do not depend on u. In its step, whatever the weights have become, a blank in place of u changes the
sum by at most C: a Gaussian release of multiplier m.
Steps after it, momentum, the server's work and the rounds of others know of u through noised sums only:
post-processing. Further passes are further releases, chosen in the light of those before, and so is a round
that is done again: they compose (`accounting`), P passes to m / √P. ∎

Another unit in place of u, and not a blank, moves the sum by up to 2 C: m / 2. Someone with k units in a silo
moves it by up to k C: m / k.

Gradients of single units cost no further pass through the LLM: its samples do not see each other, so the
gradient of the losses by the visual tokens has a part for every picture, and those of a unit are pulled
back through the projector for each unit on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedcmp.federate.arithmetic.updates import State
from fedcmp.federate.privacy.noise import standard_normal

# Gradients of single units that are held at a time, in numbers: 128 MB in float32.
_NUMBERS = 2**25


@dataclass(frozen=True)
class NoisySteps:
    """How private steps turn a batch's units into a gradient.

    Attributes:
        clip: C, the norm that a unit's gradient may have.
        multiplier: m.
        divisor: B.
    """

    clip: float
    multiplier: float
    divisor: int

    def gradient(self, projector: nn.Module, features: Tensor, visual: Tensor, units: Tensor) -> State:
        """The noised mean gradient by parameter, float32, on the projector's device.

        Args:
            projector: Its weights are where the gradient is taken.
            features: `(pictures, patches, d_vision)` float32.
            visual: Gradients of the units' losses by their visual tokens, `(pictures, tokens, d_llm)`.
            units: `(pictures,)` int64, ascending: which unit each picture is of.

        Raises:
            ValueError: A gradient is not finite.
        """
        noised = {}
        for name, total in clipped_sum(projector, features, visual, units, self.clip).items():
            noise = self.multiplier * self.clip * standard_normal(total.shape) if self.multiplier else 0.0
            noised[name] = ((total.cpu() + noise) / self.divisor).float().to(total.device)
        return noised


def clipped_sum(projector: nn.Module, features: Tensor, visual: Tensor, units: Tensor, clip: float) -> State:
    """Σ_u g_u min(1, C / ‖g_u‖) by parameter, float64; shapes as in `NoisySteps.gradient`.

    Raises:
        ValueError: A gradient is not finite.
    """
    weights = {name: parameter.detach() for name, parameter in projector.named_parameters()}

    def pulled(pictures: Tensor, gradient: Tensor) -> State:
        """One unit's gradient by parameter."""
        pull: Any = vjp(lambda own: functional_call(projector, own, (pictures,)), weights)[1]
        (found,) = pull(gradient)
        return found

    totals = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    size = max(1, _NUMBERS // sum(weight.numel() for weight in weights.values()))
    for rows in _alike(units):
        for some in rows.split(size):
            # Fused attention has no rule for vmap.
            with sdpa_kernel(SDPBackend.MATH):
                gradients = vmap(pulled)(features[some], visual[some])
            norms = torch.stack([_norms(each) for each in gradients.values()]).norm(dim=0)
            if not bool(torch.isfinite(norms).all()):
                raise ValueError("a gradient is not finite")
            factors = (clip / norms).clamp(max=1)
            for name, each in gradients.items():
                totals[name] += torch.tensordot(factors, each.double(), dims=1)
    return totals


def _alike(units: Tensor) -> Iterator[Tensor]:
    """`(units, pictures)` rows of the units that have equally many pictures, for every such number."""
    _, counts = units.unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    for count in counts.unique().tolist():
        yield first[counts == count, None] + torch.arange(count, device=units.device)


def _norms(gradients: Tensor) -> Tensor:
    """`(units,)` float64."""
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=torch.float64)
