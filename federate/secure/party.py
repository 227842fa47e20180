"""A client's side of secure sums (Bonawitz et al., 2017, arXiv 1611.04482).

Every sum is a session of its own with fresh keys: what is revealed to close one says nothing about another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fedcmp.federate.secure.checks import sealed_up
from fedcmp.federate.secure.masks import KeyPair, add_mask, add_pair_masks, derive, seal, unseal
from fedcmp.federate.secure.numbers import LEAST, SECRET_BYTES, encode, split
from fedcmp.federate.secure.replies import digest_of
from fedcmp.federate.secure.signing import Signing
from fedcmp.pipeline.hashes import fingerprint

Contribute = Callable[[dict[str, Any]], np.ndarray]
Release = Callable[[dict[str, Any], list[str]], None]


def invited(roster: dict[str, Any], threshold: int) -> str:
    """Hash of who takes part, with which keys, and how many have to stay."""
    return fingerprint([roster, threshold])


def context(roster: dict[str, Any], sharers: list[str], threshold: int, request: dict[str, Any]) -> bytes:
    """What all must agree on; clients that are told different things get masks that do not cancel."""
    return fingerprint([roster, sharers, threshold, request]).encode()


class Party:
    """One client in one session; each step can be taken once.

    Args:
        name: The client's name.
        contribute: What it adds to the sum that a request asks for, float64.
        release: Told the request and who is in the sum before it is unmasked; raises ValueError to refuse.
        signing: How clients know each other; None where they trust the server with that.
    """

    def __init__(
        self,
        name: str,
        contribute: Contribute,
        release: Release = lambda *sum_: None,
        signing: Signing | None = None,
    ) -> None:
        self._name, self._contribute, self._release, self._signing = name, contribute, release, signing
        self._request: dict[str, Any] = {}
        self._what = b""
        self._agreed: list[str] = []
        self._mask, self._seal = KeyPair(), KeyPair()
        self._seed = os.urandom(SECRET_BYTES)
        self._roster: dict[str, dict[str, str]] = {}
        self._signed: dict[str, str] = {}
        self._threshold = 0
        self._inbox: dict[str, list[int]] = {}
        self._next = "advertise"

    def step(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take the next step of the protocol.

        Raises:
            ValueError: It is not the next one, or would reveal more than a sum of enough clients.
        """
        if request["step"] != self._next:
            raise ValueError(f"client '{self._name}' expects '{self._next}', not '{request['step']}'")
        self._next = "failed"
        steps = {
            "advertise": self._advertise,
            "share": self._share,
            "mask": self._masked,
            **({"agree on": self._agree_on} if self._signing else {}),
            "unmask": self._unmask,
        }
        reply = steps[request["step"]](request)
        order = [*steps, "finished"]
        self._next = order[order.index(request["step"]) + 1]
        return reply

    def _advertise(self, request: dict[str, Any]) -> dict[str, Any]:
        # The last part holds this client to its seed, whoever puts it together in the end.
        commitment = derive(self._seed, b"commitment").hex()
        own = {"mask": self._mask.public.hex(), "seal": self._seal.public.hex(), "seed": commitment}
        if self._signing and not self._signed:
            self._signed = self._signing.signed(self._name, own)
        return self._signed or own

    def _share(self, request: dict[str, Any]) -> dict[str, Any]:
        """Shares of the own seed and mask key for everybody, each sealed for its holder."""
        self._roster, self._threshold = request["roster"], request["threshold"]
        names = sorted(self._roster)
        if len(names) < LEAST or not len(names) / 2 < self._threshold <= len(names):
            raise ValueError(
                f"client '{self._name}' refuses a sum of {len(names)} clients with threshold "
                f"{self._threshold}: there must be at least {LEAST}, and the threshold above one half of them"
            )
        if self._roster.get(self._name) != self._advertise({}):
            raise ValueError(f"client '{self._name}' is listed with keys that are not its own")
        if self._signing:
            self._signing.check_roster(self._roster)
        seeds = split(self._seed, len(names), self._threshold)
        keys = split(self._mask.private, len(names), self._threshold)
        self._inbox[self._name] = [seeds[names.index(self._name)], keys[names.index(self._name)]]
        sealed = {
            other: seal(self._sealing(other), json.dumps([seed, key]).encode(), self._way(other)).hex()
            for other, seed, key in zip(names, seeds, keys, strict=True)
            if other != self._name
        }
        told = invited(self._roster, self._threshold)
        return {"sealed": sealed, "sha256": fingerprint(sealed), "told": told}

    def _way(self, to: str, sender: str | None = None) -> bytes:
        """From whom to whom among whom: a share that is sent back, or into another sum, does not open."""
        return fingerprint([sender or self._name, to, self._roster, self._threshold]).encode()

    def _sealing(self, other: str) -> bytes:
        pair = "\0".join(sorted((self._name, other))).encode()
        return self._seal.agree(bytes.fromhex(self._roster[other]["seal"]), b"seal\0" + pair)

    def _masked(self, request: dict[str, Any]) -> dict[str, Any]:
        """The contribution under the own mask and one with everybody who shared."""
        for other, sealed in request["inbox"].items():
            try:
                opened = unseal(self._sealing(other), bytes.fromhex(sealed), self._way(self._name, other))
            except ValueError as error:
                raise ValueError(f"client '{self._name}': of client '{other}' {error}") from None
            self._inbox[other] = json.loads(opened)
        sharers = sorted(self._inbox)
        if len(sharers) < max(self._threshold, LEAST):
            raise ValueError(f"client '{self._name}' refuses a sum of {len(sharers)} clients")
        self._request = request["request"]
        what = self._what = context(self._roster, sharers, self._threshold, self._request)
        try:
            total = sealed_up(encode(self._contribute(self._request)), what)
        except ValueError as error:
            raise ValueError(f"client '{self._name}': {error}") from None
        add_mask(total, derive(self._seed, b"self\0" + what), 1)
        others = {
            other: bytes.fromhex(self._roster[other]["mask"]) for other in sharers if other != self._name
        }
        add_pair_masks(total, self._mask, self._name, others, what)
        masked = torch.from_numpy(total.view(np.int64))
        return {"masked": masked, "sha256": digest_of(masked), "told": what.decode()}

    def _agree_on(self, request: dict[str, Any]) -> dict[str, Any]:
        """A signature that these are in the sum, and nobody else."""
        assert self._signing is not None
        self._survivors(request)
        self._agreed = sorted(request["survivors"])
        return {"signature": self._signing.agreed(self._what, self._agreed)}

    def _unmask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Shares of the seeds of those who are in the sum, and of the keys of those who are not."""
        survivors, dropped = self._survivors(request)
        if self._signing:
            if sorted(survivors) != self._agreed:
                raise ValueError(f"client '{self._name}' refuses to unmask another sum than it signed")
            signatures = request.get("signatures")
            self._signing.check_agreed(self._what, survivors, self._threshold, signatures)
        self._release(self._request, sorted(survivors))
        return {
            "seeds": {each: str(self._inbox[each][0]) for each in sorted(survivors)},
            "keys": {each: str(self._inbox[each][1]) for each in sorted(dropped)},
        }

    def _survivors(self, request: dict[str, Any]) -> tuple[set[str], set[str]]:
        """Who is in the sum and who is not, if that can be."""
        survivors, dropped = set(request["survivors"]), set(request["dropped"])
        if survivors & dropped or survivors | dropped != self._inbox.keys():
            raise ValueError(
                f"client '{self._name}' refuses to unmask: nobody may be both in the sum and not"
            )
        if len(survivors) < max(self._threshold, LEAST) or self._name not in survivors:
            raise ValueError(f"client '{self._name}' refuses to unmask a sum of {len(survivors)} clients")
        return survivors, dropped
