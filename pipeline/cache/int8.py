"""Features in one byte: every channel has its own mean and step, both taken from a sample.

A few channels of vision transformers are a hundred times larger than the others. With one step a
token they would take the whole range of a byte; with one step a channel they cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedcmp.pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

SAMPLE_IMAGES = 64
_LARGEST = 127
# In standard deviations; less than four would fit a small sample and cut off the rest.
_RANGES = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0)


@dataclass(frozen=True)
class Quantiser:
    """A feature is `mean + step * q` with q from -127 to 127.

    Attributes:
        mean: `(d_vision,)` float32.
        step: `(d_vision,)` float32, positive.
    """

    mean: np.ndarray
    step: np.ndarray

    @classmethod
    def fit(cls, features: np.ndarray) -> Quantiser:
        """Mean and step of every channel; the step is the best of a few on the sample.

        Args:
            features: `(images, patches, d_vision)` float32, finite.

        Raises:
            UserError: There is no image in the sample.
        """
        if not len(features):
            raise UserError("int8 needs readable images to measure the channels of; see what was skipped")
        rows = features.reshape(-1, features.shape[-1])
        mean = rows.mean(0, dtype=np.float64).astype(np.float32)
        spread = np.maximum(rows.std(0, dtype=np.float64).astype(np.float32), np.finfo(np.float32).tiny)
        tries = [cls(mean, spread * np.float32(width / _LARGEST)) for width in _RANGES]
        costs = [np.square(rows - (each.encode(rows) * each.step + mean)).sum(0) for each in tries]
        best = np.argmin(costs, axis=0)
        return cls(mean, np.stack([each.step for each in tries])[best, np.arange(len(mean))])

    def encode(self, features: np.ndarray) -> np.ndarray:
        """Float32 features to int8; what lies outside the range takes its end."""
        scaled = np.rint((features - self.mean) / self.step)
        return np.clip(scaled, -_LARGEST, _LARGEST, out=scaled).astype(np.int8)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """Int8 to float32 features."""
        import torch

        step, mean = (torch.from_numpy(each).to(stored.device) for each in (self.step, self.mean))
        return stored.to(torch.float32).mul_(step).add_(mean)

    def error(self, features: np.ndarray, stored: np.ndarray) -> tuple[float, float, int, int]:
        """Sums over features: squared error, squared size, values at the end of the range, all values."""
        wrong = features - (stored * self.step + self.mean)
        return (
            float(np.square(wrong, dtype=np.float64).sum()),
            float(np.square(features, dtype=np.float64).sum()),
            int((np.abs(stored) == _LARGEST).sum()),
            stored.size,
        )
