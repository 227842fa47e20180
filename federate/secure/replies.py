"""Answers to the steps of a secure sum: those that are none count as no answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from fedcmp.pipeline.console import say

Answers = dict[str, dict[str, Any]]

_KEY = re.compile(r"[0-9a-f]{64}")
_SEALED = re.compile(r"[0-9a-f]{2,2000}")
_SHARE = re.compile(r"[0-9]{1,160}")


def sound(
    step: str, answers: Mapping[str, dict[str, Any]], requests: Mapping[str, dict[str, Any]]
) -> Answers:
    """The answers that are of the form of their step; who gave another one is named and left out.

    Args:
        step: The step.
        answers: Answers by client.
        requests: What the clients were asked, by client.
    """
    kept: Answers = {}
    lengths = _common_length(answers) if step == "mask" else 0
    for client, answer in answers.items():
        request = requests.get(client, {})
        if step == "advertise":
            rest = {name: each for name, each in answer.items() if name != "signature"}
            good = _texts(rest, {"mask", "seal", "seed"}, _KEY) and _signature(
                answer, len(answer) > len(rest)
            )
        elif step == "agree on":
            good = answer.keys() == {"signature"} and _signature(answer, True)
        elif step == "share":
            rest = {name: each for name, each in answer.items() if name != "sealed"}
            sealed = answer.get("sealed")
            good = isinstance(sealed, dict) and _texts(sealed, set(request["roster"]) - {client}, _SEALED)
            good = good and _texts(rest, {"sha256", "told"}, _KEY)
        elif step == "mask":
            rest = {name: each for name, each in answer.items() if name != "masked"}
            good = _length(answer.get("masked")) == lengths > 0 and _texts(rest, {"sha256", "told"}, _KEY)
        else:
            good = answer.keys() == {"seeds", "keys"} and all(
                isinstance(answer[part], dict) and _texts(answer[part], set(request[who]), _SHARE)
                for part, who in (("seeds", "survivors"), ("keys", "dropped"))
            )
        if good:
            kept[client] = answer
        else:
            say(f"{client} dropped out of the secure sum: its answer to '{step}' is none")
    return kept


def unspoiled(answers: Answers, told: str, part: str, digest: Callable[[Any], str]) -> Answers:
    """The answers that came as they were sent, of clients that were told what the server has.

    Whoever else is named and left out, as nothing of the sum could be used with it. The hashes say nothing
    new: the server knows what it told and what came.

    Args:
        answers: By client, with two hashes: `told`, of what it was told, and `sha256`, of what it sent.
        told: Hash of what all were told.
        part: What of an answer was hashed.
        digest: Its hash.
    """
    kept: Answers = {}
    for client, answer in answers.items():
        came = digest(answer[part])
        if (answer["told"], answer["sha256"]) == (told, came):
            kept[client] = answer
            continue
        wrong, there, here = (
            ("it was told something else than the server has", answer["told"], told)
            if answer["told"] != told
            else ("what it sent did not come as it was", answer["sha256"], came)
        )
        say(
            f"{client} dropped out of the secure sum: {wrong} (SHA-256 {there[:16]} there, {here[:16]} "
            "here); a bit flipped at one of the two machines or between them"
        )
    return kept


def digest_of(masked: Tensor) -> str:
    """SHA-256 (hex) of numbers."""
    return sha256(masked.contiguous().numpy().data).hexdigest()


def _texts(answer: Mapping[str, Any], names: Collection[str], form: re.Pattern[str]) -> bool:
    return answer.keys() == set(names) and all(
        isinstance(each, str) and form.fullmatch(each) for each in answer.values()
    )


def _signature(answer: Mapping[str, Any], there: bool) -> bool:
    return not there or (
        isinstance(answer["signature"], str) and bool(_SEALED.fullmatch(answer["signature"]))
    )


def _length(masked: Any) -> int:
    right = isinstance(masked, Tensor) and masked.dtype == torch.int64 and masked.ndim == 1
    return len(masked) if right else 0


def _common_length(answers: Mapping[str, dict[str, Any]]) -> int:
    """Of most of them; all contribute as many numbers."""
    lengths = [length for answer in answers.values() if (length := _length(answer.get("masked")))]
    return max(set(lengths), key=lengths.count, default=0)
