"""Where models run and in which dtype; decided without importing torch where there is no GPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from pipeline.errors import UserError


def pick_device(name: str) -> str:
    """`cpu` or `cuda`; `auto` is CUDA where torch can use it.

    Raises:
        UserError: CUDA is asked for and torch sees none.
    """
    usable = name != "cpu" and _has_driver() and _torch_sees_cuda()
    if name == "cuda" and not usable:
        raise UserError("device = 'cuda': torch sees no CUDA device; use device = 'cpu' or 'auto'")
    return "cuda" if usable else "cpu"


def pick_dtype(name: str, device: str) -> str:
    """`auto` is bfloat16 on CUDA and float32 on the CPU."""
    if name != "auto":
        return name
    return "bfloat16" if device == "cuda" else "float32"


def _has_driver() -> bool:
    if Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _torch_sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
