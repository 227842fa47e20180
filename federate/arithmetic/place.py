"""Where the large products and decompositions of matrices are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_PLACE: ContextVar[str] = ContextVar("place", default="cpu")


@contextmanager
def computing_on(device: str) -> Iterator[None]:
    """Until the end, on a device such as `cuda`; results come back to the CPU."""
    token = _PLACE.set(device)
    try:
        yield
    finally:
        _PLACE.reset(token)


def place() -> torch.device:
    """Where to compute now."""
    return torch.device(_PLACE.get())
