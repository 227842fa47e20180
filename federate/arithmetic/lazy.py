"""Tensors that are made whenever they are asked for, so that few of many are in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping

from torch import Tensor


class Lazy(Mapping[str, Tensor]):
    """Tensors by name; none is kept here.

    Args:
        names: Their names, in order.
        make: Makes one, equal every time.
    """

    def __init__(self, names: Collection[str], make: Callable[[str], Tensor]) -> None:
        self._make, self._names = make, dict.fromkeys(names)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
