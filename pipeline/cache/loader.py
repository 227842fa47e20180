"""Batches of features in any order, read ahead by two threads into a ring of buffers used again and again.

A fresh buffer a batch costs three times the copy, as every page of it is first cleared by the system.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from fedcmp.pipeline.cache.reader import FeatureCache
from fedcmp.pipeline.models.device import moved

_BUFFERS = 2
_WARM = 1e9


def stored_batches(
    caches: Sequence[FeatureCache], samples: np.ndarray, batch_size: int, *, pin: bool = False
) -> Generator[Tensor, None, None]:
    """Features in their storage dtype, in the order of `samples`: nothing here is left to chance.

    Args:
        caches: Of one key.
        samples: `(samples, 2)` of (index into `caches`, row).
        batch_size: Samples a batch; the last one may be smaller.
        pin: Keep the buffers where a GPU can copy from them itself.

    Yields:
        `(batch, patches, d_vision)`; overwritten once the next batch is asked for.

    Raises:
        CorruptCacheError: A chunk fails its crc32c.
    """
    first = caches[0]
    shape = (min(batch_size, max(len(samples), 1)), first.patches, first.d_vision)
    size = int(np.prod(shape)) * first.dtype.itemsize
    parts = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    free: SimpleQueue[np.ndarray | None] = SimpleQueue()
    ready: SimpleQueue[np.ndarray | BaseException] = SimpleQueue()
    for _ in range(_BUFFERS):
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
        free.put(memory.numpy().view(first.dtype).reshape(shape))

    def copy(part: np.ndarray, targets: np.ndarray) -> None:
        for target, (silo, row) in zip(targets, part.tolist(), strict=True):
            caches[silo].copy(row, target)

    def fill() -> None:
        try:
            cold = True
            for part in parts:
                if cold:
                    _will_need(caches, part)
                buffer = free.get()
                if buffer is None:
                    return
                began = time.monotonic()
                targets = buffer.reshape(shape[0], -1).view(np.uint8)[: len(part)]
                half = len(part) // 2
                other = helper.submit(copy, part[:half], targets[:half])
                copy(part[half:], targets[half:])
                other.result()
                # To ask the system for what it has already costs a fifth of the copy.
                cold = (time.monotonic() - began) * _WARM > targets.nbytes
                ready.put(buffer)
        except BaseException as error:
            ready.put(error)

    helper = ThreadPoolExecutor(1, thread_name_prefix="features")
    thread = threading.Thread(target=fill, name="features", daemon=True)
    thread.start()
    try:
        for part in parts:
            buffer = ready.get()
            if isinstance(buffer, BaseException):
                raise buffer
            yield torch.from_numpy(buffer[: len(part)])
            free.put(buffer)
    finally:
        # Whoever stops early finds the thread waiting for a buffer, or lets it fill those that are free.
        free.put(None)
        thread.join()
        helper.shutdown()


def _will_need(caches: Sequence[FeatureCache], samples: np.ndarray) -> None:
    for silo, row in samples.tolist():
        caches[silo].will_need([row])


def float_batches(
    caches: Sequence[FeatureCache], samples: np.ndarray, batch_size: int, device: torch.device
) -> Generator[Tensor, None, None]:
    """The same as float32 on a device, each batch in memory of its own."""
    batches = stored_batches(caches, samples, batch_size, pin=device.type == "cuda")
    there = _copies(device)
    for number, stored in enumerate(batches):
        copied = there(stored)
        if caches[0].quantiser is None:
            features = caches[0].decoded(copied)
            # What is float32 already would share the buffer.
            yield features.clone() if features is stored else features.float()
            continue
        silos = torch.from_numpy(samples[number * batch_size :][: len(stored), 0].copy())
        decoded = torch.empty(copied.shape, dtype=torch.float32, device=device)
        for silo in silos.unique().tolist():
            # Every silo has steps of its own.
            mine = moved((silos == silo).nonzero().flatten(), device)
            decoded[mine] = caches[silo].decoded(copied[mine])
        yield decoded


def _copies(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Copies buffers that are used again to a device, and waits for nothing else that it has to do."""
    if device.type != "cuda":
        return lambda buffer: buffer.to(device)
    stream = torch.cuda.Stream(device)

    def copied(buffer: Tensor) -> Tensor:
        with torch.cuda.stream(stream):
            there = buffer.to(device, non_blocking=True)
        stream.synchronize()
        there.record_stream(torch.cuda.current_stream(device))
        return there

    return copied
