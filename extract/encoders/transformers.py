"""Vision towers of transformers, loaded from a saved model's directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from extract.encoders.base import ENCODERS, Encoder, LoadedEncoder
from pipeline.errors import UserError
from pipeline.manifest import model_hashes

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


@ENCODERS.register("transformers")
class Transformers(Encoder):
    """CLIP's vision tower as LLaVA uses it.

    Args:
        path: Directory with config, weights and preprocessor configuration.
        layer: Hidden state to take, counted from the end as in LLaVA: -2 is the penultimate
            block's output, -1 the last block's, before its layer norm.
        tokens: `patch` drops the CLS token, `cls_patch` keeps it.
        pool: Side of the square of patches that are averaged into one token; 1 keeps all.
    """

    path: Path
    layer: int = Field(-2, le=-1)
    tokens: Literal["patch", "cls_patch"] = "patch"
    pool: int = Field(1, ge=1)

    def identity(self) -> dict[str, Any]:
        """Weights, configuration and preprocessing by SHA-256, and the options."""
        return {
            "name": "transformers",
            "files": model_hashes(self.path),
            "layer": self.layer,
            "tokens": self.tokens,
            "pool": self.pool,
        }

    def load(self, device: torch.device) -> LoadedEncoder:
        """Load the tower without the blocks after `layer`.

        Raises:
            UserError: The directory holds no such model, or the options do not fit it.
        """
        return _Loaded(self, device)


class _Loaded(LoadedEncoder):
    def __init__(self, options: Transformers, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        where = f"extract.encoder.path = {options.path}"
        try:
            self._processor = AutoImageProcessor.from_pretrained(options.path, backend="pil")
            model = AutoModel.from_pretrained(options.path)
        except (OSError, ValueError) as error:
            raise UserError(f"{where}: {str(error).strip().splitlines()[0]}") from None
        tower = getattr(model, "vision_model", model)
        blocks = tower.encoder.layers
        keep = len(blocks) + 1 + options.layer
        if keep < 1:
            raise UserError(
                f"extract.encoder.layer = {options.layer}: the model has only {len(blocks)} blocks"
            )
        tower.encoder.layers = blocks[:keep]
        self._tower = tower.to(device).float().eval().requires_grad_(False)
        self._device, self._options = device, options
        config = tower.config
        self._side = config.image_size // config.patch_size
        if options.pool > 1 and (options.tokens != "patch" or self._side % options.pool):
            raise UserError(
                f"extract.encoder.pool = {options.pool}: needs tokens = 'patch' and a divisor of "
                f"the {self._side}x{self._side} grid"
            )
        self.d_vision = config.hidden_size
        self.patches = (self._side // options.pool) ** 2 + (options.tokens == "cls_patch")

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return self._processor(image, return_tensors="np")["pixel_values"][0]

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        fast = self._device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16, enabled=fast):
            states = self._tower(pixels.to(self._device), output_hidden_states=True).hidden_states
        features = states[-1].float()
        if self._options.tokens == "patch":
            features = features[:, 1:]
        if self._options.pool > 1:
            step, cells = self._options.pool, math.isqrt(self.patches)
            features = features.unflatten(1, (cells, step, cells, step)).mean((2, 4)).flatten(1, 2)
        return features
