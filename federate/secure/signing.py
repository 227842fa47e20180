"""Who is who among clients: what they advertise and whom they sum over, signed with their sites' keys.

Without it a server that lies could stand between all of them. This is the variant against active servers of
Bonawitz et al. (2017), section 6.2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fedcmp.pipeline.hashes import fingerprint


@dataclass(frozen=True)
class Signing:
    """How a client signs, and knows the others' signatures.

    Attributes:
        sign: Signs bytes with this site's key.
        verify: Whether a client by name signed bytes.
    """

    sign: Callable[[bytes], bytes]
    verify: Callable[[str, bytes, bytes], bool]

    def signed(self, name: str, advertised: Mapping[str, str]) -> dict[str, str]:
        """What a client advertises, with its signature."""
        return {**advertised, "signature": self.sign(_advertised(name, advertised)).hex()}

    def check_roster(self, roster: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse keys that are not of whom they are said to be.

        Raises:
            ValueError: Naming the client.
        """
        for name, each in roster.items():
            signature = bytes.fromhex(each.get("signature", ""))
            if not self.verify(name, _advertised(name, each), signature):
                raise ValueError(
                    f"the keys for a secure sum that are said to be of client '{name}' are not signed with "
                    "its site's key; give every site the same --site-keys"
                )

    def agreed(self, what: bytes, survivors: Collection[str]) -> str:
        """A signature that this is the sum, and these are in it."""
        return self.sign(_agreed(what, survivors)).hex()

    def check_agreed(self, what: bytes, survivors: Collection[str], threshold: int, signatures: Any) -> None:
        """Refuse to unmask what not enough others want to unmask.

        Raises:
            ValueError: Fewer than the threshold signed that these are in the sum.
        """
        text = _agreed(what, survivors)
        signatures = signatures if isinstance(signatures, dict) else {}
        good = [
            name
            for name in set(survivors) & signatures.keys()
            if self.verify(name, text, _bytes(signatures[name]))
        ]
        if len(good) < threshold:
            raise ValueError(f"only {len(good)} clients, fewer than {threshold}, signed who is in the sum")


def _bytes(text: Any) -> bytes:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return b""


def _advertised(name: str, advertised: Mapping[str, str]) -> bytes:
    keys = {key: value for key, value in advertised.items() if key != "signature"}
    return fingerprint(["advertised", name, keys]).encode()


def _agreed(what: bytes, survivors: Collection[str]) -> bytes:
    return fingerprint(["survivors", what.decode(), sorted(survivors)]).encode()
