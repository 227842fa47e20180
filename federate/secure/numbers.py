"""Fixed-point numbers modulo 2^64, which masks cancel in exactly, and Shamir's shares of secrets."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

import numpy as np

# Clients that a sum hides behind each other.
LEAST = 3

SECRET_BYTES = 32
_FRACTION_BITS = 40
_WHOLE_BITS = 13  # so that a thousand clients' sum fits into the 23 bits before the point
_PRIME = 2**521 - 1


def encode(values: np.ndarray) -> np.ndarray:
    """Reals as integers modulo 2^64 with 40 bits after the point, uint64.

    Raises:
        ValueError: A value is not finite, or too large for sums of it to be distinguished.
    """
    limit = 2.0**_WHOLE_BITS
    largest = float(np.abs(values).max(initial=0))
    if not largest < limit:
        raise ValueError(f"a value of {largest:g} cannot be summed securely; it must be below {limit:g}")
    return np.rint(values * 2.0**_FRACTION_BITS).astype(np.int64).view(np.uint64)


def decode(numbers: np.ndarray) -> np.ndarray:
    """The inverse of `encode`, float64."""
    return numbers.view(np.int64) * 2.0**-_FRACTION_BITS


def split(secret: bytes, holders: int, threshold: int) -> list[int]:
    """Shamir's shares: any `threshold` of them give the secret, fewer say nothing (Shamir, 1979).

    Args:
        secret: Of 32 bytes.
        holders: Number of shares; share number i is the polynomial at i + 1.
        threshold: Shares needed.
    """
    polynomial = [int.from_bytes(secret, "big")] + [secrets.randbelow(_PRIME) for _ in range(threshold - 1)]
    return [_at(polynomial, place + 1) for place in range(holders)]


def _at(polynomial: Sequence[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % _PRIME
    return value


def recover(shares: Mapping[int, int]) -> bytes:
    """The secret, from shares by their number.

    Raises:
        ValueError: They are not shares of one secret, or too few.
    """
    secret = 0
    for place, share in shares.items():
        above = below = 1
        for other in shares:
            if other != place:
                above = above * (other + 1) % _PRIME
                below = below * (other - place) % _PRIME
        secret = (secret + share * above * pow(below, -1, _PRIME)) % _PRIME
    if secret >= 1 << (8 * SECRET_BYTES):
        raise ValueError("the shares give no secret: there are too few, or they are of different secrets")
    return secret.to_bytes(SECRET_BYTES, "big")
