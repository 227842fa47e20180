"""Who packed a cache: an ed25519 signature of its manifest, which holds the hash of everything else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError, one_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# Keys are used for other things too: a signature must not mean something elsewhere.
_CONTEXT = b"fedcmp feature cache manifest\0"
_MAKE_ONE = "make a key with: ssh-keygen -t ed25519 -N '' -f me"


def sign(manifest: bytes, key: Path) -> bytes:
    """Sign the bytes of a manifest.

    Raises:
        UserError: The key cannot be read, or is no ed25519 key.
    """
    return _private(key).sign(_CONTEXT + manifest)


def require_trusted(manifest: bytes, signature: bytes | None, key: Path, what: str) -> None:
    """Require that a manifest was signed by the owner of a key.

    Raises:
        UserError: It was not, or not by that key.
    """
    from cryptography.exceptions import InvalidSignature

    public = _public(key)
    if signature is None:
        raise UserError(f"{what}: it is not signed; have it packed with --sign, or leave --trust out")
    try:
        public.verify(signature, _CONTEXT + manifest)
    except InvalidSignature:
        raise UserError(f"{what}: not signed by the owner of {key}; do not use it") from None


def _private(path: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_ssh_private_key

    data = _read(path)
    load = load_ssh_private_key if b"OPENSSH" in data else load_pem_private_key
    try:
        key = load(data, password=None)
    except Exception as error:
        raise UserError(
            f"{path}: not a private key without passphrase ({one_line(error)}); {_MAKE_ONE}"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{path}: not an ed25519 key; {_MAKE_ONE}")
    return key


def _public(path: Path) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_public_key

    data = _read(path)
    load = load_ssh_public_key if data.startswith(b"ssh-") else load_pem_public_key
    try:
        key = load(data)
    except Exception as error:
        raise UserError(f"{path}: not a public key ({one_line(error)}); ask for the file me.pub") from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{path}: not an ed25519 key; ask for another")
    return key


def _read(path: Path) -> bytes:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise UserError("signatures need cryptography; pip install 'fedcmp[handover]'") from None
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the file of a key") from None
