"""Where models run and in which dtype; decided without importing torch where there is no GPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedcmp.pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Dense bfloat16 peaks of the makers' data sheets, TFLOP/s.
PEAKS = {
    "h200": 989.0,
    "h100": 989.0,
    "a100": 312.0,
    "l40s": 362.0,
    "a10": 125.0,
    "4090": 165.0,
    "3090": 71.0,
}


def peak(name: str) -> float | None:
    """FLOP/s of a GPU by what CUDA calls it, such as `NVIDIA H100 80GB HBM3`; None where it is not known."""
    words = name.lower().replace("-", " ").split()
    return next((1e12 * flops for kind, flops in PEAKS.items() if kind in words), None)


def pick_device(name: str) -> str:
    """`cpu`, `cuda`, or `cuda:N` for a process that torchrun started; `auto` is CUDA where torch can use it.

    Raises:
        UserError: CUDA is asked for and torch sees none, or `LOCAL_RANK` is not a number.
    """
    usable = name != "cpu" and _has_driver() and _torch_sees_cuda()
    if name == "cuda" and not usable:
        raise UserError("device = 'cuda': torch sees no CUDA device; use device = 'cpu' or 'auto'")
    return _own_gpu() if usable else "cpu"


@contextmanager
def in_one_order(device: str, *, strict: bool = True) -> Iterator[None]:
    """CUDA adds in one order, so that equal runs end in equal bytes; 3 to 5 % slower on an H200.

    Raises:
        RuntimeError: Inside, where torch has no such way of doing something; it warns if not strict.
    """
    if device_type(device) != "cuda":
        yield
        return
    import torch

    # cuBLAS asks for it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def device_type(device: str) -> str:
    """`cpu` or `cuda`: what a device is, whichever of several it is."""
    return device.partition(":")[0]


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what that has to do yet."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def pick_dtype(name: str, device: str) -> str:
    """`auto` is bfloat16 on CUDA and float32 on the CPU."""
    if name != "auto":
        return name
    return "bfloat16" if device_type(device) == "cuda" else "float32"


def _own_gpu() -> str:
    """The GPU of this process among those of its machine; torchrun numbers its processes by `LOCAL_RANK`."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None:
        return "cuda"
    if not rank.isdecimal():
        raise UserError(f"LOCAL_RANK={rank} is not a number; unset it, or start with torchrun")
    # A launcher may show every process its own GPU alone, or start more processes than there are GPUs.
    return f"cuda:{int(rank) % _gpus()}"


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


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
