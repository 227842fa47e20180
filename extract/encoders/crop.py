"""Resize and centre crop of elongated pictures, without holding in memory what is cut off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

MOST_PIXELS = 200_000_000
_LARGE = 1 << 24
_MOST_WORK = 1_000_000_000


@dataclass(frozen=True)
class CentreCrop:
    """Resize the shorter side, then cut out the centre: the preparation of CLIP and DINOv2.

    Attributes:
        edge: Shorter side after resizing.
        side: Side of the square that is cut out, at most `edge`.
        resample: Pillow's filter.
        margin: Pixels to leave out on the left or top, of (all there are, those to keep): libraries
            round an odd number differently.
    """

    edge: int
    side: int
    resample: Image.Resampling
    margin: Callable[[int, int], int]

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height after resizing."""
        shorter, longer = min(size), max(size)
        long = int(self.edge * longer / shorter)
        return (self.edge, long) if size[0] <= size[1] else (long, self.edge)

    def is_needed(self, size: tuple[int, int]) -> bool:
        """Whether a picture is so elongated that it would be enlarged beyond measure."""
        width, height = self.resized(size)
        return min(size) < self.edge and width * height > _LARGE

    def centre(self, image: Image.Image) -> Image.Image:
        """The very pixels of `image.resize(...)` cut out of its centre.

        Pillow enlarges rows first and then each column on its own, so columns that are cut off need
        not be enlarged, and the others can be a few at a time.

        Raises:
            ValueError: It would still take too much memory or time.
        """
        width, height = self.resized(image.size)
        if width * image.height > MOST_PIXELS or self.side * height > _MOST_WORK:
            raise ValueError(f"{image.width}x{image.height} pixels are too elongated to crop to a square")
        left, top = self.margin(width, self.side), self.margin(height, self.side)
        rows = image.resize((width, image.height), self.resample)
        square = Image.new("RGB", (self.side, self.side))
        step = max(_LARGE // height, 1)
        for start in range(0, self.side, step):
            stop = min(start + step, self.side)
            columns = rows.crop((left + start, 0, left + stop, image.height))
            columns = columns.resize((stop - start, height), self.resample)
            square.paste(columns.crop((0, top, stop - start, top + self.side)), (start, 0))
        return square
