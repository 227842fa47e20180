"""The server's side of secure sums: it routes, adds up, and takes off the masks of the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from fedcmp.federate.secure.checks import open_sum
from fedcmp.federate.secure.masks import KeyPair, add_mask, add_pair_masks, derive
from fedcmp.federate.secure.numbers import LEAST, decode, recover
from fedcmp.federate.secure.party import context, invited
from fedcmp.federate.secure.replies import Answers, digest_of, sound, unspoiled
from fedcmp.pipeline.console import say
from fedcmp.pipeline.errors import DroppedOutError, SpoiledError
from fedcmp.pipeline.hashes import fingerprint

Exchange = Callable[[Mapping[str, dict[str, Any]]], dict[str, dict[str, Any]]]


def threshold_of(clients: int, share: float, sums: int = 1) -> int:
    """Clients that have to stay until the end: more than the share, and enough to hide each other.

    Args:
        clients: Clients at the start.
        share: Share of them.
        sums: Sums of the same updates; every further one is an equation in them.
    """
    return min(max(int(clients * share) + 1, LEAST + sums - 1), clients)


def secure_sum(
    exchange: Exchange, clients: Sequence[str], threshold: int, request: dict[str, Any]
) -> tuple[np.ndarray, list[str]]:
    """Sum of what clients contribute, of which nobody learns more.

    Args:
        exchange: Sends every client its request and returns the answers of those who answered.
        clients: Who takes part; at least three.
        threshold: How many have to stay until the end, more than half.
        request: What to contribute, the same for all.

    Returns:
        The sum, float64, and who is in it.

    Raises:
        DroppedOutError: Too few clients stayed.
        SpoiledError: What came is not the sum of what they contributed.
    """

    def ask(
        step: str,
        requests: Mapping[str, dict[str, Any]],
        whole: Callable[[Answers], Answers] = lambda answers: answers,
    ) -> Answers:
        answers = exchange({client: {"step": step} | each for client, each in requests.items()})
        answers = whole(sound(step, answers, requests))
        if len(answers) < threshold:
            raise DroppedOutError(
                f"a secure sum needs {threshold} of {len(clients)} clients, and {len(answers)} answered "
                f"'{step}' ({', '.join(sorted(answers)) or 'none'}); see above what stopped the others, then "
                "run this again"
            )
        return answers

    roster = ask("advertise", {client: {} for client in clients})
    sealed = ask(
        "share",
        {client: {"roster": roster, "threshold": threshold} for client in roster},
        lambda answers: unspoiled(answers, invited(roster, threshold), "sealed", fingerprint),
    )
    sharers = sorted(sealed)
    inboxes = {
        client: {
            "inbox": {other: sealed[other]["sealed"][client] for other in sharers if other != client},
            "request": request,
        }
        for client in sharers
    }
    what = context(roster, sharers, threshold, request)
    masked = ask("mask", inboxes, lambda answers: unspoiled(answers, what.decode(), "masked", digest_of))
    survivors = sorted(masked)
    dropped = sorted(set(sharers) - set(survivors))
    ending: dict[str, Any] = {"survivors": survivors, "dropped": dropped}
    asked: list[str] = survivors
    if all("signature" in each for each in roster.values()):
        agreed = ask("agree on", dict.fromkeys(survivors, ending))
        asked = sorted(agreed)
        ending = ending | {"signatures": {client: each["signature"] for client, each in agreed.items()}}
    shares = ask("unmask", dict.fromkeys(asked, ending))
    total = np.zeros(len(masked[survivors[0]]["masked"]), np.uint64)
    for client in survivors:
        total += masked[client]["masked"].numpy().view(np.uint64)
    # Places are those of the roster, which is what clients split their secrets by.
    place = {client: number for number, client in enumerate(sorted(roster))}

    def secret(client: str, part: str, advertised: Callable[[bytes], str]) -> bytes:
        """A client's seed or mask key, which is what it advertised."""

        def fits(found: bytes) -> bool:
            return advertised(found) == roster[client][part]

        kind = "seeds" if part == "seed" else "keys"
        return _recovered(
            client, {h: each[kind][client] for h, each in shares.items()}, place, threshold, fits
        )

    for client in survivors:
        seed = secret(client, "seed", lambda found: derive(found, b"commitment").hex())
        add_mask(total, derive(seed, b"self\0" + what), -1)
    mask_keys = {client: bytes.fromhex(roster[client]["mask"]) for client in survivors}
    for client in dropped:
        key = secret(client, "mask", lambda found: KeyPair(found).public.hex())
        # What the survivors' masks with this client add up to is the opposite of what its own would be.
        add_pair_masks(total, KeyPair(key), client, mask_keys, what)
    return decode(open_sum(total, what, len(survivors))), survivors


def _recovered(
    client: str,
    shares: Mapping[str, str],
    place: Mapping[str, int],
    threshold: int,
    fits: Callable[[bytes], bool],
) -> bytes:
    """A client's secret out of its shares, one of which may be wrong where there are more than it takes."""
    for without in (None, *shares):
        left = {place[holder]: int(share) for holder, share in shares.items() if holder != without}
        if len(left) < threshold:
            break
        with suppress(ValueError):
            if fits(secret := recover(left)):
                if without is not None:
                    say(
                        f"the share of the secret of {client} that {without} gave is wrong: {client} dealt "
                        f"out a wrong one, or {without} changed it; the others give what {client} advertised"
                    )
                return secret
    raise SpoiledError(
        f"the shares of the secret of client '{client}' do not give what it advertised: it dealt out wrong "
        f"ones, or {', '.join(shares)} changed theirs; nothing of the sum is used, run this again"
    )
