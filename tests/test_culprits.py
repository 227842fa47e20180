"""Who spoiled a secure sum is named where that can be seen; the sum goes on where enough others are left."""

from __future__ import annotations

import copy
from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from test_secure import VECTOR, Clients, Signers, constant, meddling, spoiling

from fedcmp.federate.secure.replies import digest_of
from fedcmp.federate.secure.summation import secure_sum
from fedcmp.pipeline.errors import DroppedOutError, SpoiledError
from fedcmp.pipeline.hashes import fingerprint

Requests = dict[str, dict[str, Any]]


def is_sum_of(total: np.ndarray, names: str) -> bool:
    return bool(np.abs(total - sum("abcde".index(name) + 1 for name in names) * VECTOR).max() < 1e-11)


def steps(clients: Clients) -> set[str]:
    return {step for _, step, _ in clients.seen}


@pytest.mark.parametrize("signed", [False, True], ids=["bare", "signed"])
@pytest.mark.parametrize(("place", "bit"), [(0, 0), (3, 63), (4, 17), (6, 39)])
def test_whose_numbers_changed_on_the_way_is_named(
    place: int, bit: int, signed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def flip(answers: Requests) -> None:
        masked = answers["b"]["masked"].numpy().view(np.uint64)
        masked[place] ^= np.uint64(1) << np.uint64(bit)

    clients = Signers("abcd") if signed else constant("abcd")
    total, survivors = secure_sum(spoiling(clients, "mask", flip), list("abcd"), 3, {})
    assert survivors == list("acd")
    assert is_sum_of(total, "acd")
    said = capsys.readouterr().out
    assert "b dropped out of the secure sum: what it sent did not come as it was (SHA-256 " in said
    assert said.count("dropped out") == 1


@pytest.mark.parametrize("weight", [np.nextafter(0.25, 1), 0.5])
def test_who_was_told_other_weights_is_named(weight: float, capsys: pytest.CaptureFixture[str]) -> None:
    def one_ulp(requests: Requests) -> None:
        requests["a"]["request"] = {"weight": weight}

    total, survivors = secure_sum(
        meddling(constant("abcd"), "mask", one_ulp), list("abcd"), 3, {"weight": 0.25}
    )
    assert survivors == list("bcd")
    assert is_sum_of(total, "bcd")
    said = capsys.readouterr().out
    assert "a dropped out of the secure sum: it was told something else than the server has (SHA-256 " in said
    assert said.count("dropped out") == 1


@pytest.mark.parametrize("what", ["roster", "threshold"])
def test_who_was_told_of_other_clients_is_named(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One digit of a key, where nothing is signed, or another threshold: shares for these open nowhere."""

    def other(requests: Requests) -> None:
        requests["c"] = copy.deepcopy(requests["c"])
        if what == "threshold":
            requests["c"]["threshold"] = 4
            return
        own = requests["c"]["roster"]["a"]["mask"]
        requests["c"]["roster"]["a"]["mask"] = ("0" if own[0] != "0" else "1") + own[1:]

    total, survivors = secure_sum(meddling(constant("abcd"), "share", other), list("abcd"), 3, {})
    assert survivors == list("abd")
    assert is_sum_of(total, "abd")
    said = capsys.readouterr().out
    assert "c dropped out of the secure sum: it was told something else than the server has (SHA-256 " in said
    assert said.count("dropped out") == 1


def test_whose_sealed_share_changed_on_the_way_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Not the one who cannot open it."""

    def flip(answers: Requests) -> None:
        own = answers["b"]["sealed"]["d"]
        answers["b"]["sealed"]["d"] = own[:-1] + ("0" if own[-1] != "0" else "1")

    total, survivors = secure_sum(spoiling(constant("abcd"), "share", flip), list("abcd"), 3, {})
    assert survivors == list("acd")
    assert is_sum_of(total, "acd")
    assert "b dropped out of the secure sum: what it sent did not come as it was" in capsys.readouterr().out


def test_a_client_says_whose_share_does_not_open() -> None:
    """Changed on the way to it, after the server had it."""

    def flip(requests: Requests) -> None:
        own = requests["d"]["inbox"]["b"]
        requests["d"]["inbox"]["b"] = own[:-1] + ("0" if own[-1] != "0" else "1")

    with pytest.raises(ValueError, match="client 'd': of client 'b' a sealed share was changed on its way"):
        secure_sum(meddling(constant("abcd"), "mask", flip), list("abcd"), 3, {})


def test_nothing_of_a_sum_is_unmasked_that_too_few_were_told(capsys: pytest.CaptureFixture[str]) -> None:
    clients = constant("abc")

    def lying(requests: Requests) -> None:
        requests["a"]["request"] = {"other": True}

    with pytest.raises(DroppedOutError, match=r"needs 3 of 3 clients, and 2 answered 'mask' \(b, c\)"):
        secure_sum(meddling(clients, "mask", lying), list("abc"), 3, {})
    assert "a dropped out of the secure sum: it was told something else" in capsys.readouterr().out
    assert "unmask" not in steps(clients)


def test_who_is_left_out_keeps_its_seed_to_itself() -> None:
    """The server holds the numbers of a client that it left out: it gets its mask key, and never its seed."""
    clients = constant("abcd")

    def flip(answers: Requests) -> None:
        answers["b"]["masked"].numpy()[0] ^= 1

    secure_sum(spoiling(clients, "mask", flip), list("abcd"), 3, {})
    given = [reply for _, step, reply in clients.seen if step == "unmask"]
    assert len(given) == 3
    for each in given:
        assert each["seeds"].keys() == set("acd")
        assert each["keys"].keys() == {"b"}


@pytest.mark.parametrize(("lost", "part", "whose"), [({}, "seeds", "b"), ({"c": "mask"}, "keys", "c")])
def test_who_holds_a_wrong_share_is_named(
    lost: dict[str, str], part: str, whose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one share more than it takes the secret is found without it, and is what was advertised."""
    clients = constant("abcde")
    clients.lost = lost

    def change(answers: Requests) -> None:
        answers["d"][part][whose] = str(int(answers["d"][part][whose]) + 1)

    total, survivors = secure_sum(spoiling(clients, "unmask", change), list("abcde"), 3, {})
    assert survivors == [name for name in "abcde" if name not in lost]
    assert is_sum_of(total, "".join(survivors))
    said = capsys.readouterr().out
    assert (
        f"the share of the secret of {whose} that d gave is wrong: {whose} dealt out a wrong one, or d"
        in said
    )


@pytest.mark.parametrize(("lost", "part", "whose"), [({}, "seeds", "b"), ({"c": "mask"}, "keys", "c")])
def test_wrong_shares_that_nobody_can_do_without_end_the_sum(
    lost: dict[str, str], part: str, whose: str
) -> None:
    clients = constant("abcd")
    clients.lost = lost

    def change(answers: Requests) -> None:
        for holder in "ad":
            answers[holder][part][whose] = str(int(answers[holder][part][whose]) + 1)

    with pytest.raises(
        SpoiledError,
        match=f"of the secret of client '{whose}' do not give what it advertised: .* run this again",
    ):
        secure_sum(spoiling(clients, "unmask", change), list("abcd"), 3, {})


def test_who_miscalculates_is_not_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Its numbers are hashed as it sends them, and a sum does not say which of its parts is wrong."""

    def lie(answers: Requests) -> None:
        masked = answers["b"]["masked"].numpy()
        masked[0] += 1
        answers["b"]["sha256"] = sha256(masked).hexdigest()

    with pytest.raises(SpoiledError, match="a sum does not say which; nothing of it is used"):
        secure_sum(spoiling(constant("abcd"), "mask", lie), list("abcd"), 3, {})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change",
    [{"told": "0" * 63}, {"told": 1}, {"sha256": "x" * 64}, {"more": 1}, {"masked": torch.zeros(7)}],
    ids=str,
)
def test_hashes_that_are_none_are_an_odd_answer(
    change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def odd(answers: Requests) -> None:
        answers["a"] |= change

    _, survivors = secure_sum(spoiling(constant("abcd"), "mask", odd), list("abcd"), 3, {})
    assert survivors == list("bcd")
    assert "a dropped out of the secure sum: its answer to 'mask' is none" in capsys.readouterr().out


def test_what_names_a_client_says_nothing_of_its_numbers() -> None:
    """Both hashes are of what the server sends and gets."""
    clients = constant("abcd")
    secure_sum(clients, list("abcd"), 3, {})
    for part, step, digest in (("sealed", "share", fingerprint), ("masked", "mask", digest_of)):
        answers = [reply for _, at, reply in clients.seen if at == step]
        assert len(answers) == 4
        for each in answers:
            assert each.keys() == {part, "sha256", "told"}
            assert each["sha256"] == digest(each[part])
        assert len({each["told"] for each in answers}) == 1
