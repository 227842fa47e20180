"""Who may speak to whom: certificates, site keys, and where neither is needed."""

from __future__ import annotations

import base64
import binascii
import datetime
import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcmp.federate.secure.signing import Signing
from fedcmp.pipeline.errors import UserError

# Flower's own window, which the SuperLink holds signatures to.
_EARLY, _LATE = 5.0, 305.0


@dataclass(frozen=True)
class Keys:
    """How server and sites know each other: TLS and site keys, or neither within one machine.

    Attributes:
        ca: Certificate authority of the server, for a site.
        certificate: The server's certificate.
        key: The server's private key, or the site's.
        sites: Folder with every site's public key, SILO.pub, for the server.
        insecure: No encryption; for the server also no keys, unless `sites` is given.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    sites: Path | None = None
    insecure: bool = False


class RefusedError(Exception):
    """A caller who is nobody's site, or whose clock is wrong."""


def check_place(option: str, address: str, insecure: bool) -> None:
    """Refuse to do without encryption on a network.

    Args:
        option: What gave the address, for the error.
        address: As host:port.
        insecure: Whether encryption is off.

    Raises:
        UserError: It is off and the host is not this machine, or the address is no host:port.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise UserError(f"{option} {address}: expected HOST:PORT, e.g. 127.0.0.1:18080")
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if insecure and not here:
        raise UserError(
            f"{option} {address}: --insecure is for 127.0.0.1 only, as whoever reaches that port could run "
            "the study's sites; give certificates and keys"
        )


def site_keys(folder: Path, silos: Collection[str]) -> dict[str, Path]:
    """Public key files by silo; the name of a file says whose key it is.

    Raises:
        UserError: A silo has no key, two have the same, or a file holds none.
    """
    files = {silo: folder / f"{silo}.pub" for silo in silos}
    missing = [silo for silo, file in files.items() if not file.is_file()]
    if missing:
        raise UserError(
            f"--site-keys {folder}: no {', '.join(f'{silo}.pub' for silo in missing)}; put every site's "
            "public key there, under the name of its silo"
        )
    owner: dict[bytes, str] = {}
    for silo, file in files.items():
        other = owner.setdefault(public_key(file), silo)
        if other != silo:
            raise UserError(f"{file}: the same key as {files[other].name}; every site needs a key of its own")
    return files


def public_key(file: Path) -> bytes:
    """The key in an OpenSSH public key file, as PEM, which is how SuperNodes send theirs.

    Raises:
        UserError: There is none, or not of elliptic curves.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    try:
        key = load_ssh_public_key(file.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey):
        raise UserError(
            f"{file}: no public key of an elliptic curve; make one with ssh-keygen -t ecdsa -b 384"
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signing(private: Path, folder: Path, silo: str, silos: Collection[str]) -> Signing:
    """How a site signs with its key, and knows the others by theirs.

    Args:
        private: Its private key.
        folder: Every site's public key, SILO.pub.
        silo: Its silo.
        silos: All of them.

    Raises:
        UserError: A key is missing or is none, or its own is another one in the folder.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        PublicFormat,
        load_pem_public_key,
        load_ssh_private_key,
    )

    pems = {name: public_key(file) for name, file in site_keys(folder, silos).items()}
    try:
        key = load_ssh_private_key(private.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"--key {private}: no private key of an elliptic curve without a password")
    if key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) != pems.get(silo):
        raise UserError(
            f"--key {private}: another key than {folder / f'{silo}.pub'}; give the two that belong"
        )
    own = key

    def verify(name: str, text: bytes, signature: bytes) -> bool:
        known = load_pem_public_key(pems[name]) if name in pems else None
        if not isinstance(known, ec.EllipticCurvePublicKey):
            return False
        try:
            known.verify(signature, text, ec.ECDSA(SHA256()))
        except InvalidSignature:
            return False
        return True

    return Signing(lambda text: own.sign(text, ec.ECDSA(SHA256())), verify)


def caller(headers: Mapping[bytes, bytes], silos: Mapping[bytes, str]) -> str:
    """The silo whose key signed a SuperNode's request: the time, as Flower has it.

    Args:
        headers: Of the request, with names in lower case.
        silos: Silos by public key in PEM.

    Raises:
        RefusedError: It is no site of ours, or its clock differs too much from this one's.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = base64.b64decode(headers[b"flwr-public-key"], validate=True)
        silo, signed = silos[key], headers[b"flwr-timestamp"]
        public = load_pem_public_key(key)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        signature = base64.b64decode(headers[b"flwr-signature"], validate=True)
        public.verify(signature, signed, ec.ECDSA(SHA256()))
        at = datetime.datetime.fromisoformat(signed.decode())
        late = (datetime.datetime.now(datetime.UTC) - at).total_seconds()
    except (KeyError, ValueError, TypeError, binascii.Error, InvalidSignature):
        raise RefusedError("this key is no site's of the study; give the server the .pub file") from None
    if not -_EARLY < late < _LATE:
        way = f"{late:.0f} s behind" if late > 0 else f"{-late:.0f} s ahead of"
        raise RefusedError(f"the clock of site '{silo}' is {way} the server's; set both clocks")
    return silo


def inner_authority(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, as files; for a link within one machine.

    Flower demands TLS wherever it checks site keys, also behind a gate.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    place = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(place, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, SHA256())
    )
    certificate, private = folder / "inner.crt", folder / "inner.key"
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, private
