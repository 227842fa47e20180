"""What stage one will cost, from the encoder's configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.options import Component

_POOLS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Outline:
    """An encoder's output and effort for one picture.

    Attributes:
        pool: Side of the square of patches that become one token.
        patches: Tokens.
        d_vision: Width of a token.
        flops: Multiplications and additions.
    """

    pool: int
    patches: int
    d_vision: int
    flops: int


def outlines(encoder: Component) -> list[Outline]:
    """The encoder as configured, then with every other pooling that its grid allows.

    Raises:
        UserError: There is no such encoder, or the options do not fit it.
    """
    options = encoder.model_extra or {}
    first = _outline(encoder)
    found = [first]
    for pool in _POOLS:
        if pool != first.pool and options.get("tokens", "patch") == "patch":
            pooling = "mean" if pool == 1 else options.get("pooling", "mean")
            try:
                found.append(_outline(encoder.model_copy(update={"pool": pool, "pooling": pooling})))
            except UserError:
                continue
    return found


def _outline(encoder: Component) -> Outline:
    import torch
    from PIL import Image
    from torch.utils.flop_counter import FlopCounterMode

    from fedcmp.extract.encoders.base import ENCODERS

    loaded = ENCODERS.build(encoder, "extract.encoder").load("meta", "float32")
    pixels = torch.from_numpy(loaded.preprocess(Image.new("RGB", (512, 512))))[None]
    with FlopCounterMode(display=False) as counter:
        loaded.encode(pixels.to("meta"))
    pool = (encoder.model_extra or {}).get("pool", 1)
    return Outline(pool, loaded.patches, loaded.d_vision, counter.get_total_flops())
