"""What a cache reveals: a small decoder learns to redraw pictures from their patch features.

Whoever has the encoder can make pairs of pictures and features, train such a decoder, and point it
at a cache that somebody handed over. The pictures redrawn here are none that it was trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedcmp.pipeline.cache import Quantiser
from fedcmp.pipeline.world.scenes import SIZE
from fedcmp.pipeline.world.train_vision import examples, pixels, pool

if TYPE_CHECKING:
    import torch

_SHOWN = 8
_WIDTH = 128


@dataclass(frozen=True)
class Redrawn:
    """How well pictures can be redrawn.

    Attributes:
        way: How their features were stored.
        bytes: Bytes an image takes in the cache.
        variance: Share of the pixels' variance that the redrawn pictures explain.
        psnr: Peak signal-to-noise ratio in decibels.
        found: Share of redrawn pictures to which, of all held-out ones, their original is the nearest.
        pictures: `(held out, 48, 48, 3)` float32 from 0 to 1.
    """

    way: str
    bytes: int
    variance: float
    psnr: float
    found: float
    pictures: np.ndarray


def redraw(
    weights: Path,
    *,
    pictures: int,
    held_out: int,
    steps: int,
    seed: int,
    report: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, list[Redrawn]]:
    """Train a decoder for each way of storing features.

    Args:
        weights: Directory of the frozen encoder.
        pictures: Pictures to train on.
        held_out: Pictures to redraw.
        steps: Steps a decoder is trained for.
        seed: Decides pictures and initial weights.
        report: Called after every step.

    Returns:
        The held-out originals `(held out, 48, 48, 3)` from 0 to 1, and what was redrawn.
    """
    import torch

    rng = np.random.default_rng(seed)
    shown, _ = examples(pictures + held_out, rng)
    fine = _features(weights, shown)
    target = torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255
    results = []
    for tokens, features in (("36 tokens", fine), ("9 tokens, pooled 2x2", pool(fine))):
        ways = ("bfloat16", 2, features.bfloat16().float()), ("int8", 1, _int8(features))
        for dtype, size, stored in ways:
            drawn = _decoder(stored, target[:pictures], steps, seed, report)
            cost = stored[0].numel() * size
            results.append(_judged(f"{tokens}, {dtype}", cost, drawn, target[pictures:]))
    return target[pictures:].permute(0, 2, 3, 1).numpy(), results


def _features(weights: Path, pictures: np.ndarray) -> torch.Tensor:
    import torch
    from transformers import AutoImageProcessor, CLIPVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = CLIPVisionModel.from_pretrained(weights).eval()
    processor = AutoImageProcessor.from_pretrained(weights, backend="pil", trust_remote_code=False)
    with torch.no_grad():
        parts = [
            model(pixels(part, processor), output_hidden_states=True).hidden_states[-2][:, 1:]
            for part in np.array_split(pictures, -(-len(pictures) // 256))
        ]
    return torch.cat(parts)


def _int8(features: torch.Tensor) -> torch.Tensor:
    import torch

    quantiser = Quantiser.fit(features[:64].numpy())
    return quantiser.decode(torch.from_numpy(quantiser.encode(features.numpy())))


def _decoder(
    features: torch.Tensor, target: torch.Tensor, steps: int, seed: int, report: Callable[[], None]
) -> torch.Tensor:
    """Train on the pictures there are, then redraw from all other features."""
    import torch

    side = int(features.shape[1] ** 0.5)
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    seen = grid[: len(target)]
    grid = (grid - seen.mean((0, 2, 3), keepdim=True)) / seen.std((0, 2, 3), keepdim=True)
    scale = SIZE // side
    last = torch.nn.Conv2d(_WIDTH, 3 * scale**2, 1)
    decoder = torch.nn.Sequential(
        torch.nn.Conv2d(grid.shape[1], _WIDTH, 3, padding=1),
        torch.nn.GELU(),
        torch.nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1),
        torch.nn.GELU(),
        last,
        torch.nn.PixelShuffle(scale),
    )
    generator = torch.Generator().manual_seed(seed)
    assert last.bias is not None
    for parameter in decoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
        else:
            torch.nn.init.zeros_(parameter)
    # The mean of what was seen is where it starts, not noise.
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, float(target.mean()))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        rows = torch.randint(len(seen), (64,), generator=generator)
        loss = (decoder(grid[rows]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report()
    with torch.no_grad():
        return decoder(grid[len(target) :]).clamp(0, 1)


def _judged(way: str, cost: int, drawn: torch.Tensor, target: torch.Tensor) -> Redrawn:
    import torch

    error = float((drawn - target).square().mean())
    spread = float((target - target.mean(0)).square().mean())
    nearest = torch.cdist(drawn.flatten(1), target.flatten(1)).argmin(1)
    found = float((nearest == torch.arange(len(target))).float().mean())
    shown = drawn.permute(0, 2, 3, 1).numpy()
    return Redrawn(way, cost, 1 - error / spread, float(-10 * np.log10(error)), found, shown)


def save(path: Path, originals: np.ndarray, results: list[Redrawn]) -> None:
    """Originals in the first row, below them what was redrawn in each way."""
    from PIL import Image

    def row(pictures: np.ndarray) -> Any:
        return np.concatenate(list(pictures[:_SHOWN]), axis=1)

    rows = np.concatenate([row(originals), *(row(result.pictures) for result in results)])
    image = Image.fromarray((rows * 255).round().astype(np.uint8))
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(path)
