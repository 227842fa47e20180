"""Files of pictures to RGB: what their bytes leave open is an option, and what is left out is noted."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

FULL_RANGE = 65535
_FAR_BELOW = 1 << 14

NOTES = {
    "turned": "{} turned as their EXIF orientation says",
    "orientation": "{} with an EXIF orientation, which is not applied; extract.encoder.orientation = 'exif' "
    "turns them",
    "frames": "{} with more frames or pages than one, of which the first is used",
    "on_white": "{} with transparent parts, put on white",
    "transparent": "{} with transparent parts, which show the colour stored there; "
    "extract.encoder.transparency = 'white' puts them on white",
}


@dataclass(frozen=True)
class Reading:
    """How files are read; by default as people see them.

    LLaVA's `Image.open(file).convert("RGB")` is `Reading("as_stored", "ignored")`.

    Attributes:
        orientation: Whether to turn pictures as their EXIF data say.
        transparency: Whether transparent parts show the colour that is stored there, or white.
        white_level: Value of white in 16-bit pictures, such as 4095; without it white is 65535, and
            pictures that stay far below it are refused.
    """

    orientation: Literal["as_stored", "exif"] = "exif"
    transparency: Literal["ignored", "white"] = "white"
    white_level: int | None = None


def read_rgb(data: bytes, reading: Reading) -> tuple[Image.Image, tuple[str, ...]]:
    """An encoded picture as RGB, and which of `NOTES` hold for it.

    Raises:
        ValueError: Its numbers cannot be taken for colours.
        Exception: Whatever Pillow's decoders raise on damaged files.
    """
    notes = []
    with Image.open(io.BytesIO(data)) as image:
        deep = _sixteen_bits(image)
        if _has_frames(image):
            notes.append("frames")
        image.load()
        picture: Image.Image = image
        if _orientation(image) != 1:
            if reading.orientation == "exif":
                picture = ImageOps.exif_transpose(image)
                notes.append("turned")
            else:
                notes.append("orientation")
        if picture.mode.startswith("I"):
            return _grey(picture, reading.white_level), tuple(notes)
        if picture.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range; convert it to 8 bit")
        if picture.has_transparency_data:
            clear = picture.convert("RGBA")
            if clear.getchannel("A").getextrema()[0] != 255:
                if reading.transparency == "white":
                    white = Image.new("RGBA", clear.size, "white")
                    picture = Image.alpha_composite(white, clear)
                    notes.append("on_white")
                else:
                    notes.append("transparent")
        rgb = picture.convert("RGB")
    if deep:
        _require_full_range(rgb, reading.white_level)
    return rgb, tuple(notes)


def _sixteen_bits(image: Image.Image) -> bool:
    """Whether a file of colours has 16 bits a channel, of which Pillow keeps the upper 8."""
    return image.mode != "I;16" and any(";16" in str(part[3]) for part in getattr(image, "tile", ()))


def _has_frames(image: Image.Image) -> bool:
    """Whether there is more to see than the first frame; a telephone's MPO adds only previews."""
    try:
        return image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    except Exception:  # what comes after the first frame may be damaged
        return True


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data harm no picture
        return 1
    return int(found) if isinstance(found, int) and 1 <= found <= 8 else 1


def _grey(image: Image.Image, white_level: int | None) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow would clip it to white."""
    pixels = np.asarray(image).astype(np.int64)
    darkest, brightest = pixels.min(), pixels.max()
    white = FULL_RANGE if white_level is None else white_level
    if darkest < 0 or brightest > white:
        remedy = "" if white_level is None else "; raise extract.encoder.white_level"
        raise ValueError(f"its pixels go from {darkest} to {brightest}, not from 0 to {white}{remedy}")
    if white_level is None and 0 < brightest < _FAR_BELOW:
        bits = max(int(brightest).bit_length(), 8)
        raise ValueError(
            f"its brightest pixel is {brightest} of {FULL_RANGE}, so it would be nearly black; set "
            f"extract.encoder.white_level, to {(1 << bits) - 1} where it has {bits} bits, or to {FULL_RANGE} "
            "if it is that dark"
        )
    return Image.fromarray((pixels * 256 // (white + 1)).astype(np.uint8)).convert("RGB")


def _require_full_range(rgb: Image.Image, white_level: int | None) -> None:
    if white_level == FULL_RANGE:
        return
    brightest = max(int(high) for _, high in rgb.getextrema())  # type: ignore[misc]
    if white_level is not None or 0 < brightest < _FAR_BELOW >> 8:
        raise ValueError(
            f"it has 16 bits a colour, of which only the upper 8 are read; they reach {brightest} of 255; "
            f"convert it to 8 bit, or set extract.encoder.white_level to {FULL_RANGE} to take it so"
        )
