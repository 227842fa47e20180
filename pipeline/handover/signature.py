"""Who packed a cache, as which silo and when: an ed25519 signature of all that and of its manifest.

The manifest holds the hash of everything else. Silo and time are signed with it, so that neither another
silo's cache nor an older one can take a cache's place.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcmp.pipeline.errors import UserError, one_line
from fedcmp.pipeline.hashes import canonical

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = "manifest.sig"
SIGNATURE_LIMIT = 1024
# Keys are used for other things too: a signature must not mean something elsewhere.
_CONTEXT = b"fedcmp feature cache: manifest, silo, time\0"
_FORMAT = {"name": "fedcmp-signature", "version": 1}
_EARLIER_BYTES = 64
_SILO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_MAKE_ONE = "make a key with: ssh-keygen -t ed25519 -N '' -f me"


@dataclass(frozen=True)
class Claim:
    """What a signature says besides the manifest; `time` is UTC to the microsecond, ISO 8601."""

    silo: str
    time: str

    @classmethod
    def of(cls, values: Any) -> Claim | None:
        """A claim of a JSON value, None where it is none."""
        try:
            silo, time = values["silo"], values["time"]
            known = _SILO.fullmatch(silo) is not None
            # What sorts as text must be written in one way.
            known = known and datetime.strptime(time, _TIME).strftime(_TIME) == time
        except (KeyError, TypeError, ValueError):
            return None
        return cls(silo, time) if known else None

    def plain(self) -> dict[str, str]:
        """As JSON has it."""
        return asdict(self)


def sign(manifest: bytes, key: Path, silo: str) -> bytes:
    """Sign the bytes of a manifest as a silo's, now.

    Returns:
        The bytes of `manifest.sig`.

    Raises:
        UserError: The key cannot be read or is no ed25519 key, or the silo has no plain name.
    """
    if not _SILO.fullmatch(silo):
        raise UserError(f"--silo {silo}: expected a plain name such as berlin")
    claim = Claim(silo, datetime.now(UTC).strftime(_TIME))
    private = _private(key)
    made = {
        "key": private.public_key().public_bytes_raw(),
        "ed25519": private.sign(_message(manifest, claim)),
    }
    written = {name: each.hex() for name, each in made.items()}
    return canonical({"format": _FORMAT, **claim.plain(), **written}) + b"\n"


def claim_of(signature: bytes | None) -> Claim | None:
    """What a signature says, which nobody has checked; None where there is none, or of an earlier version."""
    return _parsed(signature)[0] if signature is not None else None


def misfit(manifest: bytes, signature: bytes) -> str | None:
    """Why a signature cannot be passed on with a manifest, None where it can.

    It is checked with the key that it names itself. Whose key that is only `require_trusted` says.
    """
    claim, data = _parsed(signature) if len(signature) <= SIGNATURE_LIMIT else (None, b"")
    if claim is None:
        return "its signature cannot be read"
    key = _named_key(signature)
    if key is None:
        return "its signature is of an earlier version, which names no key to check it with"
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        return "its signature cannot be checked without cryptography (pip install 'fedcmp[handover]')"
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(data, _message(manifest, claim))
    except (InvalidSignature, ValueError):
        return "its signature does not fit its manifest"
    return None


def require_trusted(manifest: bytes, signature: bytes | None, key: Path, silo: str, what: str) -> Claim:
    """Require that a manifest was signed as a silo's by the owner of a key.

    Raises:
        UserError: It was not, or not by that key, or as another silo's.
    """
    public = _public(key)
    from cryptography.exceptions import InvalidSignature

    if signature is None:
        raise UserError(f"{what}: it is not signed; have it packed with --sign, or trust no key for it")
    claim, data = _parsed(signature)
    if claim is None:
        old = len(signature) == _EARLIER_BYTES
        why = "signed by an earlier version, without silo and time" if old else "its signature cannot be read"
        raise UserError(f"{what}: {why}; have it packed with --sign again")
    try:
        public.verify(data, _message(manifest, claim))
    except InvalidSignature:
        raise UserError(f"{what}: not signed by the owner of {key}; do not use it") from None
    require_silo(claim, silo, what)
    return claim


def require_silo(claim: Claim, silo: str, what: str) -> None:
    """Require that a cache was signed as the silo that it is to be.

    Raises:
        UserError: It was signed as another.
    """
    if claim.silo != silo:
        raise UserError(
            f"{what}: signed as silo '{claim.silo}', not as '{silo}'; call it '{claim.silo}', or have it "
            f"signed with --silo {silo}"
        )


def require_newer(claim: Claim | None, last: Claim | None, what: str) -> None:
    """Require that a cache is not older than the one whose place it takes; equal times are one signature.

    Raises:
        UserError: It was signed earlier, or that one was signed and this is not.
    """
    if last is None or (claim is not None and claim.time >= last.time):
        return
    this = "not signed" if claim is None else f"signed {claim.time}"
    raise UserError(
        f"{what}: {this}, but the cache that was here was signed {last.time}; to go back to an older one, "
        "pass --allow-older to 'fedcmp cache unpack' or 'fedcmp cache verify'"
    )


def _message(manifest: bytes, claim: Claim) -> bytes:
    return _CONTEXT + canonical({"manifest": hashlib.sha256(manifest).hexdigest(), **claim.plain()})


def _parsed(signature: bytes) -> tuple[Claim | None, bytes]:
    try:
        found = json.loads(signature)
        known = found["format"] == _FORMAT
        return (Claim.of(found) if known else None), bytes.fromhex(found["ed25519"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, b""


def _named_key(signature: bytes) -> bytes | None:
    try:
        return bytes.fromhex(json.loads(signature)["key"])
    except (KeyError, TypeError, ValueError):
        return None


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
