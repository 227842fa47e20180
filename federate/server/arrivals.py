"""A round's tensors in files, so that memory does not grow with the number of clients.

The files serve one process only: nothing is read from them that it did not write, and what a killed one left
is removed by the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from fedcmp.federate.arithmetic.lazy import Lazy
from fedcmp.federate.messages import LocalResult

ARRIVALS = "arrivals"


class Arrivals:
    """A folder of tensors, which exists while it is in use.

    Args:
        folder: Where; nobody else writes there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, count()

    @contextmanager
    def opened(self) -> Iterator[Arrivals]:
        """An empty folder, removed in the end."""
        self.clear()
        try:
            yield self
        finally:
            self.clear()

    def clear(self) -> None:
        """Remove all files; tensors that are still in use stay readable."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def kept(self, result: LocalResult) -> LocalResult:
        """The result with its tensors in files.

        Raises:
            OSError: They cannot be written.
        """
        gradient = None if result.gradient is None else self._written(result.gradient)
        return replace(result, state=self._written(result.state), gradient=gradient)

    def _written(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Path] = {}
        like: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for name, tensor in tensors.items():
            like[name], files[name] = (tensor.dtype, tensor.shape), self._folder / f"{next(self._numbers)}"
            with files[name].open("xb") as file:
                file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

        def mapped(name: str) -> Tensor:
            dtype, shape = like[name]
            if not shape.numel():
                return torch.empty(shape, dtype=dtype)
            # Private: whoever writes to the tensor does not write to the file.
            file = str(files[name])
            return torch.from_file(file, shared=False, size=shape.numel(), dtype=dtype).view(shape)

        return Lazy(files, mapped)
