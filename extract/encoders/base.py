"""What a frozen vision encoder is: pixels to patch features, and a fingerprint of its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from fedcmp.extract.pictures import Reading
from fedcmp.pipeline.options import Options
from fedcmp.pipeline.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


class LoadedEncoder(ABC):
    """An encoder in memory."""

    patches: int
    d_vision: int
    reading: Reading = Reading()

    @abstractmethod
    def preprocess(self, image: Image.Image) -> np.ndarray:
        """One RGB image to what the model takes, float32; mostly `(3, height, width)`."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """A batch of preprocessed images to features `(batch, patches, d_vision)` float32."""


class Encoder(Options, ABC):
    """The options of an encoder; cheap until it is loaded."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON value of everything that decides a feature: weights, layer, tokens, preprocessing."""

    @abstractmethod
    def load(self, device: str, dtype: str) -> LoadedEncoder:
        """Load the weights onto a device, to compute in `dtype` (autocast where it is not float32).

        On the device `meta` there are shapes alone, and no weights need to be here.
        """


ENCODERS: Registry[Encoder] = Registry("encoder", "fedcmp.extract.encoders")
