"""Keys and masks: X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305 of the `cryptography` library."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedcmp.federate.secure.numbers import SECRET_BYTES

_NONCE_BYTES = 12
_PIECE = 2**20


class KeyPair:
    """An X25519 key pair; private keys are plain bytes, so that they can be shared."""

    def __init__(self, private: bytes | None = None) -> None:
        self._key = X25519PrivateKey.from_private_bytes(private) if private else X25519PrivateKey.generate()
        self.private = self._key.private_bytes_raw()
        self.public = self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes, purpose: bytes) -> bytes:
        """A key that only the two holders know, different for every purpose."""
        return derive(self._key.exchange(X25519PublicKey.from_public_bytes(public)), purpose)


def derive(secret: bytes, purpose: bytes) -> bytes:
    """A key from a secret."""
    return HKDF(SHA256(), SECRET_BYTES, None, purpose).derive(secret)


def add_mask(total: np.ndarray, key: bytes, sign: int) -> None:
    """Add or subtract the ChaCha20 stream of a key, in place, modulo 2^64.

    Args:
        total: uint64.
        key: 32 bytes that are used for nothing else.
        sign: 1 or -1.
    """
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()
    for first in range(0, len(total), _PIECE):
        piece = total[first : first + _PIECE]
        mask = np.frombuffer(stream.update(bytes(piece.nbytes)), np.uint64)
        if sign > 0:
            piece += mask
        else:
            piece -= mask


def add_pair_masks(
    total: np.ndarray, own: KeyPair, name: str, others: Mapping[str, bytes], what: bytes
) -> None:
    """Add the masks that a client shares with others; the two of a pair have opposite signs.

    Args:
        total: uint64, changed in place.
        own: The client's mask keys.
        name: Its name.
        others: Public mask keys of the others, by name.
        what: What is summed, so that no mask is ever used twice.
    """
    for other, public in others.items():
        pair = "\0".join(sorted((name, other))).encode()
        add_mask(total, own.agree(public, b"pair\0" + what + pair), 1 if name < other else -1)


def stream(key: bytes, count: int) -> np.ndarray:
    """Numbers of the ChaCha20 stream of a key, uint64."""
    numbers = np.zeros(count, np.uint64)
    add_mask(numbers, key, 1)
    return numbers


def seal(key: bytes, text: bytes, place: bytes) -> bytes:
    """Encrypt and authenticate, together with the place that it is for."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, place)


def unseal(key: bytes, sealed: bytes, place: bytes) -> bytes:
    """The inverse of `seal`.

    Raises:
        ValueError: It was changed, or sealed with another key or for another place.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], place)
    except InvalidTag:
        raise ValueError("a sealed share was changed on its way") from None
