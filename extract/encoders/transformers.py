"""Vision towers of transformers, loaded from a saved model's directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from pydantic import Field

from extract.encoders.base import ENCODERS, Encoder, LoadedEncoder
from pipeline.errors import UserError, one_line
from pipeline.manifest import model_hashes

if TYPE_CHECKING:
    import numpy as np
    import torch


_FAMILIES = ("clip", "clip_vision_model")


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
            "files": model_hashes(self.path, ["preprocessor_config.json"]),
            "layer": self.layer,
            "tokens": self.tokens,
            "pool": self.pool,
        }

    def load(self, device: str, dtype: str) -> LoadedEncoder:
        """Load the tower without the blocks after `layer`.

        Raises:
            UserError: The directory holds no such model, or the options do not fit it.
        """
        return _Loaded(self, device, dtype)


class _Loaded(LoadedEncoder):
    def __init__(self, options: Transformers, device: str, dtype: str) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        where = f"extract.encoder.path = {options.path}"
        try:
            family = AutoConfig.from_pretrained(options.path).model_type
            if family not in _FAMILIES:
                raise UserError(f"{where}: a model of type '{family}'; supported: {', '.join(_FAMILIES)}")
            self._processor = AutoImageProcessor.from_pretrained(options.path, backend="pil")
            model = AutoModel.from_pretrained(options.path)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{where}: cannot be loaded: {one_line(error)}") from None
        tower = getattr(model, "vision_model", model)
        blocks = tower.encoder.layers
        keep = len(blocks) + 1 + options.layer
        if keep < 1:
            raise UserError(
                f"extract.encoder.layer = {options.layer}: the model has only {len(blocks)} blocks"
            )
        tower.encoder.layers = blocks[:keep]
        self._tower = tower.to(device).float().eval().requires_grad_(False)
        self._device, self._dtype, self._options = device, dtype, options
        config = tower.config
        pixels = self.preprocess(Image.new("RGB", (config.image_size, config.image_size))).shape
        if pixels != (3, config.image_size, config.image_size):
            raise UserError(
                f"{where}: its processor gives pixels {pixels}, its model takes images of "
                f"{config.image_size}; set crop_size in preprocessor_config.json"
            )
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

        fast = self._dtype != "float32"
        with torch.inference_mode(), torch.autocast(self._device, torch.bfloat16, enabled=fast):
            states = self._tower(pixels.to(self._device), output_hidden_states=True).hidden_states
        features = states[-1].float()
        if self._options.tokens == "patch":
            features = features[:, 1:]
        if self._options.pool > 1:
            step, cells = self._options.pool, math.isqrt(self.patches)
            features = features.unflatten(1, (cells, step, cells, step)).mean((2, 4)).flatten(1, 2)
        return features
