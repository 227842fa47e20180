"""What encoders of patches share: which tokens are kept and pooled, how pictures become square."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image
from pydantic import Field

from fedcmp.extract.encoders import Encoder, LoadedEncoder, Reading, UserError
from fedcmp.extract.encoders.crop import MOST_PIXELS, CentreCrop
from fedcmp.extract.pictures import FULL_RANGE
from fedcmp.pipeline.models.device import device_type
from fedcmp.pipeline.models.saved_model import why_unloadable

if TYPE_CHECKING:
    import numpy as np
    import torch

_TORCHVISION = (
    "install the torchvision made for this torch (where torch is the CPU build: pip install "
    "--force-reinstall torch torchvision --index-url https://download.pytorch.org/whl/cpu)"
)


_OF_FIRST_CACHES: dict[str, Any] = {
    "pooling": "mean",
    "resize": "crop",
    "orientation": "as_stored",
    "transparency": "ignored",
    "white_level": None,
}


class PatchEncoder(Encoder, ABC):
    """Options of every encoder of patches.

    Args:
        layer: Block whose output to take, counted from the end as LLaVA counts hidden states: -2 is
            the penultimate block's output, -1 the last block's, before any final norm.
        tokens: `patch` keeps the patches alone, `cls_patch` puts the CLS token first; register
            tokens are always dropped.
        pool: Side of the square of patches that become one token; 1 keeps all.
        pooling: `mean` averages the square, `pixel_shuffle` concatenates its patches' channels.
        resize: `crop` prepares pictures as the model's own processor does (CLIP and DINOv2: centre
            crop, SigLIP: squash); `pad` makes them square with the processor's mean colour first;
            `squash` ignores the aspect ratio. `pad` and `squash` show the whole picture.
        orientation: `exif` turns pictures as their EXIF data say; `as_stored` reads pixels in the
            order of the file, as LLaVA does.
        transparency: `white` puts pictures on white; `ignored` shows the colour that is stored under
            transparent parts, as LLaVA does.
        white_level: Value of white in 16-bit grey pictures, such as 4095; by default 65535, and
            pictures that stay far below it are listed as unreadable.
    """

    layer: int = Field(-2, le=-1)
    tokens: Literal["patch", "cls_patch"] = "patch"
    pool: int = Field(1, ge=1)
    pooling: Literal["mean", "pixel_shuffle"] = "mean"
    resize: Literal["crop", "pad", "squash"] = "crop"
    orientation: Literal["as_stored", "exif"] = "exif"
    transparency: Literal["ignored", "white"] = "white"
    white_level: int | None = Field(None, ge=255, le=FULL_RANGE)

    def choices(self) -> dict[str, Any]:
        """Identity of these options: what differs from how the first caches were made, which name none."""
        chosen = {"layer": self.layer, "tokens": self.tokens, "pool": self.pool}
        later = {name: getattr(self, name) for name in _OF_FIRST_CACHES}
        return chosen | {name: value for name, value in later.items() if value != _OF_FIRST_CACHES[name]}


class LoadedPatchEncoder(LoadedEncoder):
    """An encoder of a square grid of patches in memory.

    Args:
        options: What to do with pictures and tokens.
        device: Where to compute.
        dtype: What to compute in.
        grid: Patches along a side.
        width: Channels of a hidden state.
        has_cls: Whether a CLS token comes before the patches.
        mean: The processor's mean colour, each channel from 0 to 1.
        crop: What `_pixels` does with the shape of pictures where it cuts out their centre.

    Raises:
        UserError: The options do not fit the model.
    """

    def __init__(
        self,
        options: PatchEncoder,
        device: str,
        dtype: str,
        *,
        grid: int,
        width: int,
        has_cls: bool,
        mean: Sequence[float],
        crop: CentreCrop | None = None,
    ) -> None:
        if options.tokens == "cls_patch" and not has_cls:
            raise UserError(
                "extract.encoder.tokens = 'cls_patch': this model has no CLS token; set tokens = 'patch'"
            )
        if options.pool > 1 and (options.tokens != "patch" or grid % options.pool):
            raise UserError(
                f"extract.encoder.pool = {options.pool}: needs tokens = 'patch' and a divisor of "
                f"the {grid}x{grid} grid"
            )
        if options.pool == 1 and options.pooling != "mean":
            raise UserError(
                f"extract.encoder.pooling = '{options.pooling}': has no effect with pool = 1; set pool to 2 "
                "or more"
            )
        self._shared, self._device, self._dtype = options, device, dtype
        if dtype == "float32":
            _convolve_in_full_precision()
        self.reading = Reading(options.orientation, options.transparency, options.white_level)
        self._crop = crop if options.resize == "crop" else None
        self._fill = tuple(int(value * 255) for value in mean)
        shuffled = options.pooling == "pixel_shuffle"
        self.d_vision = width * (options.pool**2 if shuffled else 1)
        self.patches = (grid // options.pool) ** 2 + (options.tokens == "cls_patch")

    @abstractmethod
    def _pixels(self, image: Image.Image, *, cropped: bool = False) -> np.ndarray:
        """One RGB image, square already where it is padded or `cropped` to size, to float32 pixels."""

    @abstractmethod
    def _states(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states: the CLS token's `(batch, 0 or 1, width)`, the patches' `(batch, n, width)`."""

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """One RGB image to what the model takes, float32.

        Raises:
            ValueError: The picture is too elongated to be padded or cropped.
        """
        if self._shared.resize == "pad":
            return self._pixels(expand_to_square(image, self._fill))
        if self._crop is not None and self._crop.is_needed(image.size):
            return self._pixels(self._crop.centre(image), cropped=True)
        return self._pixels(image)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(batch, ...)` to features `(batch, patches, d_vision)` float32."""
        import torch

        faster = (
            nullcontext()
            if self._dtype == "float32"
            else torch.autocast(device_type(self._device), torch.bfloat16)
        )
        with torch.inference_mode(), faster:
            cls, patches = self._states(pixels.to(self._device))
        if self._shared.tokens == "cls_patch":
            return torch.cat([cls, patches], 1).float()
        return pool_squares(patches.float(), self._shared.pool, self._shared.pooling)


def _convolve_in_full_precision() -> None:
    """Float32 means float32: torch convolves in TF32 on CUDA, off by 3e-4 with ViT-L/14 on an H100."""
    import torch

    cudnn: Any = torch.backends.cudnn
    # torch 2.9 renamed it, and warns of the older name.
    if hasattr(cudnn, "conv") and hasattr(cudnn.conv, "fp32_precision"):
        cudnn.conv.fp32_precision = "ieee"
    else:
        cudnn.allow_tf32 = False


def pool_squares(patches: torch.Tensor, side: int, how: str) -> torch.Tensor:
    """Merge each square of patches into one token, row by row.

    Args:
        patches: `(batch, n, channels)` of a square grid, row by row.
        side: Side of the square; divides the grid's.
        how: `mean`, or `pixel_shuffle`: the square's patches row by row, each with all its channels,
            as in the connectors of InternVL (arXiv 2404.16821) and Idefics3 (arXiv 2408.12637).

    Returns:
        `(batch, n / side², channels)`, or `channels · side²` where shuffled.
    """
    if side == 1:
        return patches
    cells = math.isqrt(patches.shape[1]) // side
    squares = patches.unflatten(1, (cells, side, cells, side))
    if how == "mean":
        return squares.mean((2, 4)).flatten(1, 2)
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


def expand_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Centre a picture on a square of one colour, as `expand2square` of LLaVA (llava/mm_utils.py) does.

    Raises:
        ValueError: The square would be too large to hold in memory for every worker.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    if side * side > MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels are too elongated to pad to a square")
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def check_layer(layer: int, blocks: int) -> int:
    """How many of a model's blocks to keep.

    Raises:
        UserError: The model has fewer blocks than `layer` counts.
    """
    keep = blocks + 1 + layer
    if keep < 1:
        raise UserError(f"extract.encoder.layer = {layer}: the model has only {blocks} blocks")
    return keep


def unloadable(where: str, error: Exception) -> UserError:
    """Why a model or its library cannot be loaded, with the remedy where torchvision is at fault."""
    remedy = f"; {_TORCHVISION}" if "torchvision" in str(error) else ""
    return UserError(f"{where}: cannot be loaded: {why_unloadable(error)}{remedy}")
