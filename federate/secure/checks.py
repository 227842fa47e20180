"""Whether a sum is what its clients added: numbers at its end that hold for every vector, and so for sums.

Masks that do not cancel leave numbers of any size that look like an update. Who was told something else, or
whose numbers changed on the way, is found before (`replies.unspoiled`); who miscalculates or lies is not.
"""

from __future__ import annotations

import numpy as np

from fedcmp.federate.secure.masks import derive, stream
from fedcmp.pipeline.errors import SpoiledError

_MORE = 3


def sealed_up(numbers: np.ndarray, what: bytes) -> np.ndarray:
    """A client's numbers with 1 and two checksums after them, all modulo 2^64.

    Args:
        numbers: uint64.
        what: What is summed and over whom; it decides the factors of the checksums, which are public.
    """
    return np.concatenate([numbers, np.array([1], np.uint64), _sums(numbers, what)])


def open_sum(total: np.ndarray, what: bytes, clients: int) -> np.ndarray:
    """The sum of the clients' numbers.

    Raises:
        SpoiledError: It is not the sum of so many vectors that were sealed up alike.
    """
    numbers, count, sums = total[:-_MORE], int(total[-_MORE]), total[1 - _MORE :]
    if count != clients or not np.array_equal(sums, _sums(numbers, what)):
        raise SpoiledError(
            f"the secure sum over {clients} clients does not add up, though all were told the same and "
            "nothing changed on the way: one of them miscalculated or lies, and a sum does not say which; "
            "nothing of it is used, run this again"
        )
    return numbers


def _sums(numbers: np.ndarray, what: bytes) -> np.ndarray:
    """Two of them: odd factors find any change of one number, others also pairs of changes."""
    odd = stream(derive(what, b"first checksum"), len(numbers)) | np.uint64(1)
    other = stream(derive(what, b"second checksum"), len(numbers))
    return np.array([(numbers * each).sum(dtype=np.uint64) for each in (odd, other)], np.uint64)
