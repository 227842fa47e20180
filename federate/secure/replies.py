"""Answers to the steps of a secure sum: those that are none count as no answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.console import say

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
            good = _texts(answer, set(request["roster"]) - {client}, _SEALED)
        elif step == "mask":
            good = answer.keys() == {"masked"} and _length(answer["masked"]) == lengths > 0
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
