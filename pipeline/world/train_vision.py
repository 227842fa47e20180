"""Train the frozen vision encoder of the embedded default, supervised per patch and per picture.

The heads are thrown away afterwards; what stays are patch features from which the colour, shape,
size and cell of what a patch shows, and the rendering domain, can be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fedcmp.pipeline.world.scenes import COLOURS, DOMAINS, GRID, SHAPES, SIZE, SIZES, Content, Scene, render

if TYPE_CHECKING:
    import torch
    from transformers import CLIPVisionModel

PATCHES = 6
_PER_CELL = PATCHES // GRID
_COLOUR, _SHAPE, _SIZE = list(COLOURS), list(SHAPES), list(SIZES)
_HEADS = {
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES) + 1,
    "size": len(SIZES) + 1,
    "cell": GRID * GRID,
    "domain": len(DOMAINS),
}


def targets(scene: Scene) -> np.ndarray:
    """Class indices `(patches, heads)` int64; class 0 of the first three heads is background."""
    cells = np.zeros((GRID * GRID, len(_HEADS)), np.int64)
    for thing in scene.things:
        cells[thing.cell, :3] = (
            1 + _COLOUR.index(thing.colour),
            1 + _SHAPE.index(thing.shape),
            1 + _SIZE.index(thing.size),
        )
    cells[:, 3] = np.arange(GRID * GRID)
    cells[:, 4] = DOMAINS.index(scene.domain)
    grid = cells.reshape(GRID, GRID, -1).repeat(_PER_CELL, 0).repeat(_PER_CELL, 1)
    return grid.reshape(PATCHES * PATCHES, -1)


def examples(number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pictures `(number, 48, 48, 3)` uint8 and targets `(number, patches, heads)` int64."""
    content = Content(count=(1, 2, 3))
    pictures = np.empty((number, SIZE, SIZE, 3), np.uint8)
    classes = np.empty((number, PATCHES * PATCHES, len(_HEADS)), np.int64)
    for index in range(number):
        scene = content.sample(rng)
        pictures[index] = render(scene, rng)
        classes[index] = targets(scene)
    return pictures, classes


def pixels(pictures: np.ndarray, processor: object) -> torch.Tensor:
    """Normalise pictures as the processor would: float32 `(batch, 3, 48, 48)`."""
    import torch

    mean = torch.tensor(processor.image_mean).view(3, 1, 1)  # type: ignore[attr-defined]
    std = torch.tensor(processor.image_std).view(3, 1, 1)  # type: ignore[attr-defined]
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std


def train(
    model: CLIPVisionModel,
    processor: object,
    *,
    seed: int,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> dict[str, float]:
    """Train in place with AdamW and a one-cycle learning rate; fresh pictures at every step.

    The heads read the penultimate block, which is what the default's cache stores, pooled 2x2 to
    one token a cell; the last block and the CLS token stay as initialised.

    Returns:
        Held-out accuracy of each head on the pooled tokens, over cells that show something.
    """
    import torch
    from torch.nn.functional import cross_entropy

    rng = np.random.default_rng(seed)
    heads = torch.nn.ModuleDict(
        {name: torch.nn.Linear(model.config.hidden_size, classes) for name, classes in _HEADS.items()}
    )
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.15, cycle_momentum=False
    )

    def patches(pictures: np.ndarray) -> torch.Tensor:
        states = model(pixels(pictures, processor), output_hidden_states=True).hidden_states
        return states[-2][:, 1:]

    for step in range(steps):
        pictures, classes = examples(batch_size, rng)
        fine, wanted = patches(pictures), torch.from_numpy(classes)
        loss = torch.zeros(())
        for tokens, labels in ((fine, wanted), (pool(fine), pool_classes(wanted))):
            for index, head in enumerate(heads.values()):
                loss = loss + cross_entropy(head(tokens).flatten(0, 1), labels[..., index].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(step, loss.item())

    pictures, classes = examples(1000, rng)
    wanted = pool_classes(torch.from_numpy(classes))
    shown = wanted[..., 0] > 0
    with torch.no_grad():
        tokens = pool(patches(pictures))
        return {
            name: float((head(tokens).argmax(-1) == wanted[..., index])[shown].float().mean())
            for index, (name, head) in enumerate(heads.items())
        }


def pool(patches: torch.Tensor) -> torch.Tensor:
    """Mean of the 2x2 patches of each cell: `(batch, 36, d)` to `(batch, 9, d)`."""
    grid = patches.unflatten(1, (GRID, _PER_CELL, GRID, _PER_CELL))
    return grid.mean((2, 4)).flatten(1, 2)


def pool_classes(classes: torch.Tensor) -> torch.Tensor:
    """The classes of each cell: `(batch, 36, heads)` to `(batch, 9, heads)`."""
    grid = classes.unflatten(1, (GRID, _PER_CELL, GRID, _PER_CELL))
    return grid[:, :, 0, :, 0].flatten(1, 2)
