"""Procedural scenes: one to three coloured shapes on a 3x3 grid, drawn in six rendering domains.

A scene is plain data, so captions, questions and labels are exact. `render` draws at twice the
size and shrinks, which gives antialiased edges without a graphics library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 48
GRID = 3
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 85, 225),
    "yellow": (240, 215, 45),
    "purple": (145, 55, 185),
    "orange": (245, 135, 25),
    "cyan": (45, 205, 215),
    "pink": (250, 135, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
SIZES = ("small", "large")
DOMAINS = ("flat", "outline", "dark", "photo", "sketch", "pixel")

_SCALE = 2
_CANVAS = SIZE * _SCALE
_RADIUS = {"small": 10.0, "large": 14.5}


@dataclass(frozen=True)
class Thing:
    """One object of a scene; `cell` counts the grid row by row from the top left."""

    colour: str
    shape: str
    size: str
    cell: int


@dataclass(frozen=True)
class Scene:
    """What is in a picture (things ordered by cell) and how it is drawn."""

    domain: str
    things: tuple[Thing, ...]


@dataclass(frozen=True, kw_only=True)
class Content:
    """Distribution of a silo's scenes; weights need not be normalised."""

    domain: Sequence[float] = (1,) * len(DOMAINS)
    colour: Sequence[float] = (1,) * len(COLOURS)
    shape: Sequence[float] = (1,) * len(SHAPES)
    count: Sequence[float] = (1, 1, 1)

    def sample(self, rng: np.random.Generator) -> Scene:
        """Draw one scene."""
        cells = sorted(rng.permutation(GRID * GRID)[: 1 + _choice(rng, self.count)].tolist())
        colours, things = list(COLOURS), []
        for cell in cells:
            things.append(
                Thing(
                    colour=colours[_choice(rng, self.colour)],
                    shape=SHAPES[_choice(rng, self.shape)],
                    size=SIZES[int(rng.integers(2))],
                    cell=cell,
                )
            )
        return Scene(DOMAINS[_choice(rng, self.domain)], tuple(things))


def _choice(rng: np.random.Generator, weights: Sequence[float]) -> int:
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene as uint8 RGB of shape `(48, 48, 3)`; `rng` gives jitter, angles and noise."""
    layers = [
        (thing, _polygon(thing, rng), np.array(COLOURS[thing.colour], float) + rng.normal(0, 8, 3))
        for thing in scene.things
    ]
    picture = _PAINTERS[scene.domain](layers, rng)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _polygon(thing: Thing, rng: np.random.Generator) -> list[tuple[float, float]]:
    step = _CANVAS / GRID
    row, column = divmod(thing.cell, GRID)
    jitter = 2.5 if thing.size == "small" else 1.5
    x = (column + 0.5) * step + rng.uniform(-jitter, jitter)
    y = (row + 0.5) * step + rng.uniform(-jitter, jitter)
    radius = _RADIUS[thing.size] * rng.uniform(0.94, 1.06)
    angle = rng.uniform(-0.12, 0.12)
    cosine, sine = math.cos(angle) * radius, math.sin(angle) * radius
    return [(x + cosine * u - sine * v, y + sine * u + cosine * v) for u, v in _UNIT[thing.shape]]


def _regular(corners: int, start: float, radii: Sequence[float] = (1.0,)) -> list[tuple[float, float]]:
    return [
        (
            radii[i % len(radii)] * math.cos(start + 2 * math.pi * i / corners),
            radii[i % len(radii)] * math.sin(start + 2 * math.pi * i / corners),
        )
        for i in range(corners)
    ]


def _heart() -> list[tuple[float, float]]:
    turns = np.linspace(0, 2 * math.pi, 28, endpoint=False)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return [(float(u) / 17, float(-v - 2) / 17) for u, v in zip(x, y, strict=True)]


_UNIT: dict[str, list[tuple[float, float]]] = {
    "circle": _regular(28, 0.0),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.98, 0.8), (-0.98, 0.8)],
    "star": _regular(10, -math.pi / 2, (1.1, 0.45)),
    "cross": [
        (-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33),
        (0.33, 1), (-0.33, 1), (-0.33, 0.33), (-1, 0.33), (-1, -0.33), (-0.33, -0.33),
    ],
    "ring": _regular(28, 0.0),
    "diamond": [(0.0, -1.15), (0.72, 0.0), (0.0, 1.15), (-0.72, 0.0)],
    "heart": _heart(),
}  # fmt: skip

_Layer = tuple[Thing, list[tuple[float, float]], np.ndarray]


def _mask(thing: Thing, corners: list[tuple[float, float]], width: int = 0) -> np.ndarray:
    """Coverage in [0, 1] of shape `(48, 48, 1)`: filled, or the outline where `width` > 0."""
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw = ImageDraw.Draw(canvas)
    if width:
        draw.line([*corners, *corners[:2]], fill=255, width=width, joint="curve")
    else:
        draw.polygon(corners, fill=255)
    if thing.shape == "ring":
        centre = np.mean(corners, axis=0)
        hole = [tuple(centre + 0.52 * (np.array(corner) - centre)) for corner in corners]
        if width:
            draw.line([*hole, *hole[:2]], fill=255, width=max(2, width - 1), joint="curve")
        else:
            draw.polygon(hole, fill=0)
    return _shrink(canvas)


def _shrink(canvas: Image.Image) -> np.ndarray:
    pixels = np.asarray(canvas, np.float32).reshape(SIZE, _SCALE, SIZE, _SCALE)
    return pixels.mean((1, 3))[..., None] / 255


def _blur(field: np.ndarray, radius: float) -> np.ndarray:
    channels = [
        np.asarray(Image.fromarray(channel).filter(ImageFilter.GaussianBlur(radius)))
        for channel in np.moveaxis(np.clip(field, 0, 255).astype(np.uint8), -1, 0)
    ]
    return np.stack(channels, -1).astype(np.float32)


def _over(picture: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return picture * (1 - mask) + colour * mask


def _flat(layers: list[_Layer], rng: np.random.Generator) -> np.ndarray:
    picture = np.full((SIZE, SIZE, 3), rng.uniform(225, 250), np.float32)
    for thing, corners, colour in layers:
        picture = _over(picture, colour, _mask(thing, corners))
    return picture


def _outline(layers: list[_Layer], rng: np.random.Generator) -> np.ndarray:
    picture = np.full((SIZE, SIZE, 3), rng.uniform(240, 255), np.float32)
    for thing, corners, colour in layers:
        picture = _over(picture, colour * 0.9, _mask(thing, corners, width=4))
    return picture


def _dark(layers: list[_Layer], rng: np.random.Generator) -> np.ndarray:
    picture = np.zeros((SIZE, SIZE, 3), np.float32) + rng.uniform(8, 28, 3)
    light = np.zeros_like(picture)
    for thing, corners, colour in layers:
        light = _over(light, colour, _mask(thing, corners))
    return picture + 0.8 * light + 0.7 * _blur(light, 3.0)


def _photo(layers: list[_Layer], rng: np.random.Generator) -> np.ndarray:
    coarse = rng.uniform(70, 190, (4, 4, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    picture: np.ndarray = np.asarray(smooth, np.float32)
    ramp = np.linspace(0.75, 1.2, SIZE, dtype=np.float32)[::-1, None, None]
    for thing, corners, colour in layers:
        mask = _mask(thing, corners)
        shadow = np.roll(_blur(255 * np.repeat(mask, 3, -1), 1.2) / 255, (1, 1), (0, 1))
        picture = picture * (1 - 0.5 * shadow)
        picture = _over(picture, colour * ramp, mask)
    return picture + rng.normal(0, 6, picture.shape)


def _sketch(layers: list[_Layer], rng: np.random.Generator) -> np.ndarray:
    picture = np.full((SIZE, SIZE, 3), 238, np.float32) + rng.normal(0, 4, (SIZE, SIZE, 1))
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    hatch = (((rows + columns + int(rng.integers(4))) % 4) < 2)[..., None].astype(np.float32)
    for thing, corners, colour in layers:
        picture = _over(picture, colour, 0.85 * _mask(thing, corners) * hatch)
        picture = _over(picture, colour * 0.55, _mask(thing, corners, width=3))
    return picture


def _pixel(layers: list[_Layer], rng: np.random.Generator) -> np.ndarray:
    picture = np.zeros((SIZE, SIZE, 3), np.float32) + rng.uniform(170, 215, 3)
    for thing, corners, colour in layers:
        mask = _mask(thing, corners).reshape(SIZE // 2, 2, SIZE // 2, 2, 1).mean((1, 3))
        blocks = (mask > 0.5).astype(np.float32).repeat(2, 0).repeat(2, 1)
        picture = _over(picture, np.round(colour / 64) * 64, blocks)
    return picture


_PAINTERS = {
    "flat": _flat,
    "outline": _outline,
    "dark": _dark,
    "photo": _photo,
    "sketch": _sketch,
    "pixel": _pixel,
}
