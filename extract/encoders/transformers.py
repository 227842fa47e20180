"""Vision towers of transformers, loaded from a saved model's directory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from fedcmp.extract.encoders import ENCODERS, LoadedEncoder, UserError
from fedcmp.extract.encoders.crop import CentreCrop
from fedcmp.extract.encoders.patches import LoadedPatchEncoder, PatchEncoder, check_layer, unloadable
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.models.saved_model import model_hashes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Family:
    """How the towers of one model type are built.

    `positions` says which inputs they take: of the size they were trained at (`learned`), of any
    size (`any`), or sequences of patches (`naflex`).
    """

    blocks: str
    has_cls: bool
    positions: Literal["learned", "any", "naflex"]


_CLIP = _Family("encoder.layers", True, "learned")
_SIGLIP = _Family("encoder.layers", False, "learned")
_NAFLEX = _Family("encoder.layers", False, "naflex")
_DINOV2 = _Family("encoder.layer", True, "any")
FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _NAFLEX,
    "siglip2_vision_model": _NAFLEX,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": _Family("model.layer", True, "any"),
    "aimv2": _SIGLIP,
    "aimv2_vision_model": _SIGLIP,
}


@ENCODERS.register("transformers")
class Transformers(PatchEncoder):
    """Vision towers of CLIP, SigLIP, SigLIP2, DINOv2, DINOv3 and AIMv2.

    Args:
        path: Directory with config, weights and preprocessor configuration.
    """

    path: Path

    def identity(self) -> dict[str, Any]:
        """Weights, configuration and preprocessing by SHA-256, and the options."""
        files = ["preprocessor_config.json"]
        if "image_processor" in (read_json(self.path / "processor_config.json") or {}):
            files.append("processor_config.json")
        return {"name": "transformers", "files": model_hashes(self.path, files), **self.choices()}

    def load(self, device: str, dtype: str) -> LoadedEncoder:
        """Load the tower without the blocks after `layer`.

        Raises:
            UserError: The directory holds no such model, or the options do not fit it.
        """
        return _Loaded(self, device, dtype)


class _Loaded(LoadedPatchEncoder):
    def __init__(self, options: Transformers, device: str, dtype: str) -> None:
        where = f"extract.encoder.path = {options.path}"
        family, self._processor, tower = _read(options.path, where, device)
        config = tower.config
        any_size = family.positions == "any" or getattr(config, "is_native", False)
        self._naflex = family.positions == "naflex"
        self._values = None if self._naflex else _values_of_levels(self._processor)
        if self._naflex:
            self._side = math.isqrt(self._processor.max_num_patches) * config.patch_size
        elif any_size:
            self._side = self._processed(Image.new("RGB", (256, 256))).shape[-1]
        else:
            self._side = config.image_size
        self._grid = self._side // config.patch_size
        super().__init__(
            options,
            device,
            dtype,
            grid=self._grid,
            width=config.hidden_size,
            has_cls=family.has_cls,
            mean=self._processor.image_mean,
            crop=_crop(self._processor),
        )
        if self._naflex and options.resize == "crop":
            raise UserError(
                f"extract.encoder.resize = 'crop': the processor in {options.path} keeps every picture's "
                "aspect ratio, a cache needs one grid; set resize to 'pad' or 'squash'"
            )
        wanted = (self._grid**2, 3 * config.patch_size**2) if self._naflex else (3, self._side, self._side)
        pixels = self.preprocess(Image.new("RGB", (2 * self._side, self._side))).shape
        if pixels != wanted:
            raise UserError(
                f"{where}: its processor gives pixels {pixels}, its model takes images of {self._side} "
                f"{wanted}; set crop_size in preprocessor_config.json, or resize to 'pad' or 'squash'"
            )
        self._prefix = int(family.has_cls) + getattr(config, "num_register_tokens", 0)
        self._seen: list[torch.Tensor] = []
        _cut(tower, family.blocks, options.layer).register_forward_hook(self._see)
        self._tower = tower.to(device).float().eval().requires_grad_(False)

    def _see(self, block: Any, inputs: Any, output: Any) -> None:
        self._seen.append(output[0] if isinstance(output, tuple) else output)

    def _pixels(self, image: Image.Image, *, cropped: bool = False) -> np.ndarray:
        if cropped:
            return self._processed(image, do_resize=False)
        if self._shared.resize == "crop":
            return self._processed(image)
        if self._naflex:
            square = image.resize((self._side, self._side), self._processor.resample)
            return self._processed(square)[: self._grid**2]
        size = {"height": self._side, "width": self._side}
        return self._processed(image, size=size, do_center_crop=False)

    def _processed(self, image: Image.Image, **instead: Any) -> np.ndarray:
        if self._values is None:
            return _prepared(self._processor, image, **instead)
        return _from_levels(self._processor, self._values, image, **instead)

    def _states(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        inputs = {"pixel_values": pixels}
        if self._naflex:
            inputs["pixel_attention_mask"] = torch.ones(
                pixels.shape[:2], dtype=torch.int64, device=pixels.device
            )
            inputs["spatial_shapes"] = torch.full((len(pixels), 2), self._grid, device=pixels.device)
        self._tower(**inputs)
        states = self._seen.pop()
        return states[:, : min(self._prefix, 1)], states[:, self._prefix :]


def _read(path: Path, where: str, device: str) -> tuple[_Family, Any, Any]:
    """Family, image processor and vision tower of a saved model."""
    try:
        import torch
        from transformers import AutoConfig, AutoImageProcessor, AutoModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = config.model_type
        if kind not in FAMILIES:
            raise UserError(f"{where}: a model of type '{kind}'; supported: {', '.join(FAMILIES)}")
        processor = AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=False)
        if device == "meta":
            with torch.device(device):
                model = AutoModel.from_config(config, trust_remote_code=False)
            return FAMILIES[kind], processor, getattr(model, "vision_model", model)
        model, report = AutoModel.from_pretrained(path, output_loading_info=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise unloadable(where, error) from None
    tower = getattr(model, "vision_model", model)
    parts = tower.state_dict().keys()
    lost = sorted(key for key in report["missing_keys"] if key.removeprefix("vision_model.") in parts)
    if lost:
        raise UserError(
            f"{where}: its weights lack {lost[0]} and {len(lost) - 1} more, which would be random; save the "
            "model again with the transformers that is installed"
        )
    return FAMILIES[kind], processor, tower


def _prepared(processor: Any, image: Image.Image, **instead: Any) -> np.ndarray:
    return processor(image, return_tensors="np", **instead)["pixel_values"][0]


def _values_of_levels(processor: Any) -> np.ndarray | None:
    """What a processor makes of each of a colour's 256 levels, float32 `(3, 256)`.

    Looking a pixel's value up takes half the time of computing it. None where that gives
    something else, as with processors that resize what they have rescaled.
    """
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3))
    values = _prepared(processor, ramp, do_resize=False, do_center_crop=False)[:, 0]
    noise = Image.fromarray(np.random.default_rng(0).integers(256, size=(240, 320, 3), dtype=np.uint8))
    try:
        looked_up = _from_levels(processor, values, noise)
    except (IndexError, TypeError, ValueError):
        return None
    return values if np.array_equal(looked_up, _prepared(processor, noise)) else None


def _from_levels(processor: Any, values: np.ndarray, image: Image.Image, **instead: Any) -> np.ndarray:
    levels = _prepared(processor, image, do_rescale=False, do_normalize=False, **instead)
    return np.stack([np.take(colour, plane) for colour, plane in zip(values, levels, strict=True)])


def _crop(processor: Any) -> CentreCrop | None:
    """What a processor does with shapes, where it resizes the shorter side and cuts out the centre."""
    size, side = processor.size or {}, processor.crop_size or {}
    edge = size.get("shortest_edge")
    steps = getattr(processor, "do_resize", False) and getattr(processor, "do_center_crop", False)
    if not steps or not edge or size.get("longest_edge") or side.get("height") != side.get("width"):
        return None
    if side["height"] > edge or processor.resample == Image.Resampling.NEAREST:
        return None
    resample = Image.Resampling(processor.resample)
    return CentreCrop(edge, side["height"], resample, lambda all_, kept: (all_ - kept) // 2)


def _cut(tower: Any, place: str, layer: int) -> Any:
    """Remove the blocks after `layer` from a tower; returns its new last block."""
    holder, _, name = place.rpartition(".")
    parent = tower.get_submodule(holder)
    blocks = getattr(parent, name)
    kept = blocks[: check_layer(layer, len(blocks))]
    setattr(parent, name, kept)
    return kept[-1]
