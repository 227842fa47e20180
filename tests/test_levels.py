"""Bytes that are looked up on the device become the very pixels, and the very features."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image
from test_encoders import MAKERS, clip, dinov3, save, siglip2, to_open_clip

from extract.encoders.levels import levels_of, looked_up
from extract.encoders.open_clip import OpenClip
from extract.encoders.tokens import LoadedPatchEncoder
from extract.encoders.transformers import Transformers

SIZES = [(70, 52), (52, 70), (32, 32), (400, 31), (3, 300), (1, 1)]


def images() -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture(seed, size))).convert("RGB") for seed, size in enumerate(SIZES)]


def check(encoder: LoadedPatchEncoder, side: int) -> None:
    whole = [encoder.preprocess(image) for image in images()]
    features = encoder.encode(torch.from_numpy(np.stack(whole)))
    assert all(
        np.array_equal(encoder.prepare(image), each) for image, each in zip(images(), whole, strict=True)
    )
    encoder._look_levels_up(side)
    assert encoder._levels is not None
    levels = np.stack([encoder.prepare(image) for image in images()])
    assert levels.dtype == np.uint8
    assert torch.equal(
        looked_up(torch.from_numpy(levels), encoder._levels), torch.from_numpy(np.stack(whole))
    )
    assert torch.equal(encoder.encode(torch.from_numpy(levels)), features)


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
@pytest.mark.parametrize("maker", [each for each in MAKERS if each.values[0] not in (siglip2, dinov3)])
def test_levels_of_transformers(maker: Callable[[], tuple[Any, Any]], resize: Any, tmp_path: Path) -> None:
    check(Transformers(path=save(maker, tmp_path), resize=resize).load("cpu", "float32"), 32)  # type: ignore[arg-type]


@pytest.mark.parametrize("maker", [siglip2, dinov3])
def test_what_resizes_numbers_or_cuts_patches_is_not_looked_up(maker: Any, tmp_path: Path) -> None:
    encoder: Any = Transformers(path=save(maker, tmp_path), resize="squash").load("cpu", "float32")
    encoder._look_levels_up(32)
    assert encoder._levels is None
    assert encoder.prepare(images()[0]).dtype == np.float32


@pytest.mark.parametrize("resize", ["crop", "pad", "squash"])
def test_levels_of_open_clip(resize: Any, tmp_path: Path) -> None:
    to_open_clip(save(clip, tmp_path / "clip"), tmp_path / "open")
    encoder: Any = OpenClip(model=f"local-dir:{tmp_path}/open", resize=resize).load("cpu", "float32")
    check(encoder, 32)


def test_what_is_no_table_is_not_taken_for_one() -> None:
    def bare(image: Image.Image) -> np.ndarray:
        return np.asarray(image).transpose(2, 0, 1)

    def blurred(image: Image.Image) -> np.ndarray:
        return bare(image).astype(np.float32) + bare(image).mean(dtype=np.float32)

    def few(image: Image.Image) -> np.ndarray:
        return bare(image) // 2

    assert levels_of(blurred, bare, 32) is None
    assert levels_of(few, few, 32) is None  # half of the levels do not occur
    assert (
        levels_of(lambda image: bare(image).astype(np.float32), lambda image: bare(image) * 1.0, 32) is None
    )
    table = levels_of(lambda image: bare(image).astype(np.float32) / 2, bare, 32)
    assert table is not None
    assert np.array_equal(table[1], np.arange(256, dtype=np.float32) / 2)
