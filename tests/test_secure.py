"""Secure sums: exact numbers, masks that cancel, clients that drop out, refusals, and equal results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st
from test_strategies import SHAPES, draw

from fedcmp.federate.arithmetic.updates import Memory, State, Update
from fedcmp.federate.messages import LocalResult
from fedcmp.federate.secure import numbers
from fedcmp.federate.secure.contribution import Own
from fedcmp.federate.secure.ledger import Ledger
from fedcmp.federate.secure.masked import aggregate
from fedcmp.federate.secure.masks import KeyPair, add_mask, seal, unseal
from fedcmp.federate.secure.party import Party
from fedcmp.federate.secure.signing import Signing
from fedcmp.federate.secure.summation import secure_sum, threshold_of
from fedcmp.federate.server.fusion import Secure, aggregated
from fedcmp.federate.server.progress import Progress
from fedcmp.federate.strategies.base import STRATEGIES, Aggregate, Strategy
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.pipeline.errors import ComponentError, DivergedError, DroppedOutError, SpoiledError, UserError
from fedcmp.pipeline.options import Component

VECTOR = np.array([1.5, -2.25, 0.0, 1e-9])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-8e3, 8e3), min_size=1, max_size=20))
def test_numbers_come_back_to_half_a_unit(values: list[float]) -> None:
    back = numbers.decode(numbers.encode(np.array(values)))
    assert np.abs(back - values).max() <= 2.0**-41 + 1e-15 * np.abs(values).max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -5e6])
def test_what_does_not_fit_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="cannot be summed securely"):
        numbers.encode(np.array([0.0, bad]))


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not() -> None:
    secret = bytes(range(32))
    shares = numbers.split(secret, 5, 3)
    for chosen in combinations(range(5), 3):
        assert numbers.recover({place: shares[place] for place in chosen}) == secret
    for chosen in combinations(range(5), 2):
        with pytest.raises(ValueError, match="too few"):
            numbers.recover({place: shares[place] for place in chosen})


def test_keys_agree_and_masks_are_undone() -> None:
    one, two = KeyPair(), KeyPair()
    assert one.agree(two.public, b"x") == two.agree(one.public, b"x") != one.agree(two.public, b"y")
    assert KeyPair(one.private).public == one.public
    total = np.arange(3_000_000, dtype=np.uint64)
    add_mask(total, bytes(32), 1)
    # The stream of RFC 8439, appendix A.1, test vector 1.
    assert total[:1].tobytes().hex() == "76b8e0ada0f13d90"
    add_mask(total, bytes(32), -1)
    assert np.array_equal(total, np.arange(3_000_000))
    sealed = seal(bytes(32), b"share", b"a to b")
    assert unseal(bytes(32), sealed, b"a to b") == b"share"
    for changed, place in ((sealed[:-1] + bytes([sealed[-1] ^ 1]), b"a to b"), (sealed, b"b to a")):
        with pytest.raises(ValueError, match="changed on its way"):
            unseal(bytes(32), changed, place)


class Clients:
    """Parties in this process; `lost` says who is gone from which step on."""

    def __init__(self, contribute: Mapping[str, Callable[[Any], np.ndarray]]) -> None:
        self.contribute = contribute
        self.parties: dict[str, Party] = {}
        self.lost: dict[str, str] = {}
        self.seen: list[tuple[str, str, dict]] = []

    def party(self, client: str) -> Party:
        return Party(client, self.contribute[client])

    def __call__(self, requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        replies = {}
        for client, request in requests.items():
            if request["step"] == self.lost.get(client):
                continue
            if request["step"] == "advertise":
                self.parties[client] = self.party(client)
            replies[client] = self.parties[client].step(request)
            self.seen.append((client, request["step"], replies[client]))
        return replies


def constant(names: str) -> Clients:
    return Clients({name: lambda request, k=k: (k + 1) * VECTOR for k, name in enumerate(names)})


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({}, "abcde"),
        ({"b": "advertise"}, "acde"),
        ({"b": "share"}, "acde"),
        ({"b": "mask"}, "acde"),
        ({"b": "mask", "e": "mask"}, "acd"),
        ({"b": "unmask"}, "abcde"),
        ({"a": "share", "b": "mask", "c": "unmask"}, "cde"),
    ],
)
def test_sums_survive_clients_that_drop_out(lost: dict[str, str], expected: str) -> None:
    clients = constant("abcde")
    clients.lost = lost
    threshold = 5 - len(lost)
    if threshold < 3:
        with pytest.raises(ValueError, match=r"a secure sum needs|refuses"):
            secure_sum(clients, list("abcde"), 3, {})
        return
    total, survivors = secure_sum(clients, list("abcde"), 3, {})
    assert survivors == list(expected)
    assert np.abs(total - sum("abcde".index(c) + 1 for c in expected) * VECTOR).max() < 1e-11


def test_what_the_server_gets_from_one_client_looks_random() -> None:
    """Not the contribution, and never twice the same."""
    size = 20_000
    clients = Clients(dict.fromkeys("abc", lambda request: np.zeros(size)))
    masked = []
    for _ in range(2):
        secure_sum(clients, list("abc"), 2, {})
        masked += [
            reply["masked"].numpy().view(np.uint64) for _, step, reply in clients.seen if step == "mask"
        ]
        clients.seen.clear()
    assert len(masked) == 6
    for one, two in combinations(masked, 2):
        assert (one == two).mean() < 1e-3
    for each in masked:
        ones = np.unpackbits(each.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 5 * 0.5 / (64 * size) ** 0.5


def test_clients_refuse_what_would_reveal_one_of_them() -> None:
    with pytest.raises(ValueError, match="refuses a sum of 2 clients"):
        secure_sum(constant("ab"), list("ab"), 2, {})
    with pytest.raises(ValueError, match="threshold above one half"):
        secure_sum(constant("abcd"), list("abcd"), 2, {})
    clients = constant("abc")
    secure_sum(clients, list("abc"), 3, {})
    for again in ("share", "mask", "unmask"):
        with pytest.raises(ValueError, match="expects"):
            clients.parties["a"].step({"step": again})


@pytest.mark.parametrize(
    ("component", "clients", "share", "needed"),
    [
        ({"name": "fedavg"}, 4, 0.5, 3),
        ({"name": "fedavg"}, 3, 0.1, 3),
        ({"name": "fedavg"}, 6, 0.5, 4),
        ({"name": "fedavg"}, 6, 0.67, 5),
        ({"name": "fedcmp", "reliability": "none"}, 5, 0.1, 3),
        ({"name": "fedcmp"}, 5, 0.1, 4),
        ({"name": "fedcmp"}, 4, 0.1, 4),
        ({"name": "fedcmp"}, 100, 0.5, 51),
    ],
)
def test_three_stay_to_the_end_and_one_more_for_a_second_sum(
    component: dict[str, Any], clients: int, share: float, needed: int
) -> None:
    """Every further sum of the same updates is an equation in them."""
    strategy: Strategy = STRATEGIES.build(Component(**component), "strategy")
    assert threshold_of(clients, share, strategy.releases()) == needed


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ({"survivors": ["a", "b", "c", "d"], "dropped": ["b"]}, "both in the sum and not"),
        ({"survivors": ["a", "b", "c"], "dropped": []}, "both in the sum and not"),
        ({"survivors": ["a", "b"], "dropped": ["c", "d"]}, "refuses to unmask a sum of 2"),
        ({"survivors": ["b", "c", "d"], "dropped": ["a"]}, "refuses to unmask"),
    ],
)
def test_no_client_gives_away_both_secrets_of_another(ending: dict, message: str) -> None:
    clients = constant("abcd")

    def stop(requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if next(iter(requests.values()))["step"] == "unmask":
            return {"a": clients.parties["a"].step({"step": "unmask", **ending})}
        return clients(requests)

    with pytest.raises(ValueError, match=message):
        secure_sum(stop, list("abcd"), 3, {})


def spoiling(clients: Clients, step: str, spoil: Callable[[dict[str, dict[str, Any]]], None]) -> Any:
    """The clients, whose answers to a step are changed."""

    def exchange(requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        answers = clients(requests)
        if next(iter(requests.values()))["step"] == step:
            spoil(answers)
        return answers

    return exchange


@pytest.mark.parametrize("place", [0, 3, 4, 5, 6])
@pytest.mark.parametrize("bit", [0, 17, 39, 63])
def test_a_wrong_bit_that_a_client_stands_by_is_found(place: int, bit: int) -> None:
    """In a number, in the constant or in a checksum; 2^23 and 1e-12 alike."""

    def flip(answers: dict[str, dict[str, Any]]) -> None:
        masked = answers["b"]["masked"].numpy().view(np.uint64)
        masked[place] ^= np.uint64(1) << np.uint64(bit)
        answers["b"]["sha256"] = sha256(masked).hexdigest()

    with pytest.raises(SpoiledError, match="the secure sum over 4 clients does not add up"):
        secure_sum(spoiling(constant("abcd"), "mask", flip), list("abcd"), 3, {})


class Signers(Clients):
    """Clients that sign with keys that the others know."""

    def __init__(self, names: str) -> None:
        super().__init__(constant(names).contribute)
        self.secrets = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}

    def party(self, client: str) -> Party:
        def verify(name: str, text: bytes, signature: bytes) -> bool:
            try:
                self.secrets[name].public_key().verify(signature, text, ec.ECDSA(SHA256()))
            except InvalidSignature:
                return False
            return True

        signing = Signing(lambda text: self.secrets[client].sign(text, ec.ECDSA(SHA256())), verify)
        return Party(client, self.contribute[client], signing=signing)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({}, "abcde"),
        ({"b": "mask"}, "acde"),
        ({"b": "agree on", "c": "unmask"}, "abcde"),
        ({"e": "share"}, "abcd"),
    ],
)
def test_signed_sums_are_the_same(lost: dict[str, str], expected: str) -> None:
    clients = Signers("abcde")
    clients.lost = lost
    total, survivors = secure_sum(clients, list("abcde"), 3, {})
    assert survivors == list(expected)
    assert np.abs(total - sum("abcde".index(c) + 1 for c in expected) * VECTOR).max() < 1e-11
    assert "agree on" in {step for _, step, _ in clients.seen}


def meddling(clients: Clients, step: str, meddle: Callable[[dict[str, dict[str, Any]]], None]) -> Any:
    """A server that changes what it tells clients in a step."""

    def exchange(requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        requests = copy.deepcopy(dict(requests))
        if next(iter(requests.values()))["step"] == step:
            meddle(requests)
        return clients(requests)

    return exchange


def test_keys_of_the_server_in_a_clients_name_are_refused() -> None:
    """Or without a signature, or with that of another client."""
    own = KeyPair()

    def swap(requests: dict[str, dict[str, Any]]) -> None:
        requests["a"]["roster"]["b"]["mask"] = own.public.hex()

    def strip(requests: dict[str, dict[str, Any]]) -> None:
        del requests["a"]["roster"]["b"]["signature"]

    def exchange(requests: dict[str, dict[str, Any]]) -> None:
        requests["a"]["roster"]["b"] = requests["a"]["roster"]["c"]

    for meddle in (swap, strip, exchange):
        with pytest.raises(ValueError, match="said to be of client 'b' are not signed with its site's key"):
            secure_sum(meddling(Signers("abcd"), "share", meddle), list("abcd"), 3, {})


def test_two_halves_cannot_be_told_different_survivors() -> None:
    """Which would give the server both secrets of a client, and so its update."""

    def halve(requests: dict[str, dict[str, Any]]) -> None:
        for name in "ab":
            requests[name] |= {"survivors": list("abc"), "dropped": list("de")}

    for step in ("agree on", "unmask"):
        with pytest.raises(ValueError, match=r"another sum than it signed|signed who is in the sum"):
            secure_sum(meddling(Signers("abcde"), step, halve), list("abcde"), 3, {})

    def forge(requests: dict[str, dict[str, Any]]) -> None:
        for each in requests.values():
            each["signatures"] = dict.fromkeys("abcde", each["signatures"]["a"])

    with pytest.raises(ValueError, match="only 1 clients, fewer than 3, signed who is in the sum"):
        secure_sum(meddling(Signers("abcde"), "unmask", forge), list("abcde"), 3, {})

    def strip(requests: dict[str, dict[str, Any]]) -> None:
        for each in requests.values():
            del each["signatures"]

    with pytest.raises(ValueError, match="only 0 clients, fewer than 3, signed who is in the sum"):
        secure_sum(meddling(Signers("abcde"), "unmask", strip), list("abcde"), 3, {})


def test_a_sealed_share_that_comes_back_does_not_open() -> None:
    """The two of a pair agree on one key; from whom to whom is part of what is sealed."""
    clients = constant("abcd")

    def reflect(requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        requests = {name: dict(each) for name, each in requests.items()}
        if requests["a"]["step"] == "mask":
            own = next(reply for name, step, reply in clients.seen if (name, step) == ("a", "share"))
            requests["a"]["inbox"] = dict(own["sealed"])
        return clients(requests)

    with pytest.raises(ValueError, match="a sealed share was changed on its way"):
        secure_sum(reflect, list("abcd"), 3, {})


ODD = {
    "advertise": [{}, {"mask": "a"}, {"mask": 1, "seal": 2, "seed": 3}],
    "share": [{}]
    + [
        {"sealed": each, "sha256": "0" * 64, "told": "0" * 64}
        for each in (None, {}, {"b": 1, "c": 2, "d": 3}, {"b": "zz", "c": "ab", "d": "ab"})
    ],
    "mask": [
        {},
        {"masked": 1},
        {"masked": torch.zeros(7)},
        {"masked": torch.zeros(3, dtype=torch.int64)},
        {"masked": torch.zeros(7, 1, dtype=torch.int64)},
    ],
    "unmask": [{}, {"seeds": 1, "keys": 2}, {"seeds": dict.fromkeys("abcd", "-1"), "keys": {}}],
}


@pytest.mark.parametrize(("step", "answer"), [(step, each) for step, some in ODD.items() for each in some])
def test_an_odd_answer_is_one_clients_failure(
    step: str, answer: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts as dropped out."""

    def odd(answers: dict[str, dict[str, Any]]) -> None:
        answers["a"] = answer

    total, survivors = secure_sum(spoiling(constant("abcd"), step, odd), list("abcd"), 3, {})
    assert survivors == list("abcd" if step == "unmask" else "bcd")
    assert np.abs(total - sum("abcd".index(c) + 1 for c in survivors) * VECTOR).max() < 1e-11
    assert f"a dropped out of the secure sum: its answer to '{step}' is none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0, "b": 1e-14, "c": 1e-14}, "more than half would be its own"),
        ({"a": 0.51, "b": 0.25, "c": 0.24}, "more than half would be its own"),
        ({"a": 0.5, "b": 0.5, "c": 0.0}, "over fewer than 3 clients"),
        ({"a": 0.5, "b": float("nan"), "c": 0.5}, "weights of x that are none"),
        ({"a": 0.5, "b": 1.0, "c": -0.5}, "weights of x that are none"),
    ],
)
def test_no_client_adds_most_of_a_sum(weights: dict[str, float], message: str) -> None:
    state = {"x": torch.ones(2, 2)}
    own = Own("a", state, {"x": torch.zeros(2, 2)})
    asked = {"x": weights}
    for request in (
        {"updates": asked, "grams": {}},
        {"updates": {}, "grams": {"left": asked}},
        {"updates": {}, "grams": {"left": {}, "right": asked}},
    ):
        with pytest.raises(ValueError, match=message):
            own.contribute(request)
    fair = {"updates": {"x": {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.1}}, "grams": {}}
    own.permit(fair, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="more than half would be its own"):
        own.permit(fair, ["a", "b", "c"])


def test_sums_longer_than_the_norms_that_were_said_are_refused() -> None:
    """A client that says little of its update and adds much."""
    state = draw(0)
    updates = contrary(state, 0)
    samples = {update.client: update.samples for update in updates}
    strategy = STRATEGIES.build(Component(name="fedcmp", warmup=0), "strategy")
    honest = Updates(state, updates)
    liar = Own("c3", state, {n: state[n] + 50 * (updates[3].state[n] - state[n]) for n in state})
    honest._sums.contribute["c3"] = liar.contribute  # type: ignore[index]
    with pytest.raises(SpoiledError, match="norms that"):
        aggregate(strategy, honest, state, samples, 4, {})


def test_a_ledger_survives_restarts(tmp_path: Path) -> None:
    """Two sums of an update and no third; the same again is nothing new, unless noise is."""
    start, other = {"x": torch.zeros(3)}, {"x": torch.ones(3)}

    def ledger(noisy: bool = False) -> Ledger:
        return Ledger(tmp_path / str(noisy), {"seed": 0}, "lab", noisy)

    with pytest.raises(KeyError):
        ledger().release(0, "first", "abcd")
    ledger().begin(0, start)
    ledger().begin(0, other)  # nothing was given yet
    ledger().begin(0, start)
    for _ in range(3):
        ledger().release(0, "first", "abc")
    with pytest.raises(ValueError, match="refuses a second sum over 3 clients"):
        ledger().release(0, "second", "abc")
    ledger().release(0, "second", "abcd")
    with pytest.raises(ValueError, match="it has given 2 sums of its update of round 1"):
        ledger().release(0, "third", "abcd")
    ledger().tell(0, "question")
    ledger().tell(0, "question")
    with pytest.raises(ValueError, match="told again and again"):
        ledger().tell(0, "another question")
    with pytest.raises(UserError, match="has given sums of round 1 from another projector"):
        ledger().begin(0, other)
    ledger().begin(0, start)
    ledger().begin(1, other)
    ledger().release(1, "first", "abc")
    ledger(noisy=True).begin(0, start)
    for _ in range(2):
        ledger(noisy=True).release(0, "first", "abcd")
    with pytest.raises(ValueError, match="it has given 2 sums"):
        ledger(noisy=True).release(0, "first", "abcd")


class Updates:
    """Clients that keep their updates, in this process."""

    def __init__(self, state: State, updates: list[Update]) -> None:
        self.own = {update.client: Own(update.client, state, update.state) for update in updates}
        self._sums = Clients({name: own.contribute for name, own in self.own.items()})

    def __call__(self, requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        step = next(iter(requests.values()))["step"]
        if step == "norm":
            return {name: {"norm": self.own[name].norm()} for name in requests}
        if step == "agree":
            return {
                name: self.own[name].agreements(request["totals"], request["share"])
                for name, request in requests.items()
            }
        return self._sums(requests)


def contrary(state: State, round_: int, length: float = 1.0) -> list[Update]:
    """Four clients that agree, more or less, and one that pulls elsewhere."""
    common = draw(100 + round_)
    updates = []
    for k in range(5):
        factor = -length if k == 4 else 1.0
        own = draw(10 * round_ + k)
        moved = {n: state[n] + 1e-2 * factor * (common[n] + 0.3 * own[n]) for n in state}
        updates.append(Update(f"c{k}", moved, 5 + 3 * k))
    return updates


@pytest.mark.parametrize(
    "component",
    [
        {"name": "fedavg", "server_learning_rate": 1.5},
        {"name": "fedavgm"},
        {"name": "fedprox"},
        {"name": "fedadam"},
        {"name": "fedyogi"},
        {"name": "muon"},
        {"name": "fedcmp"},
        {"name": "fedcmp", "warmup": 0},
        {"name": "fedcmp", "reliability": "none"},
        {"name": "fedcmp", "rank": 3, "momentum": 0.3, "momentum_kind": "procrustes"},
        {"name": "fedcmp", "sides": "left", "length": "fused"},
    ],
    ids=lambda component: ",".join(map(str, component.values())),
)
def test_secure_rounds_equal_plain_ones(component: dict) -> None:
    """To 1e-4 of the step, over four rounds with memory of their own."""
    strategy: Strategy = STRATEGIES.build(Component(**component), "strategy")
    start = draw(0)
    memory = strategy.begin(start, {f"c{k}": 1 for k in range(5)})
    plain: tuple[State, Memory] = (start, memory)
    masked: tuple[State, Memory] = (start, memory)
    for round_ in range(4):
        updates = contrary(plain[0], round_)
        result = strategy.aggregate(plain[0], updates, plain[1])
        moved = {u.client: {n: masked[0][n] + (u.state[n] - plain[0][n]) for n in start} for u in updates}
        again = [Update(u.client, moved[u.client], u.samples) for u in updates]
        samples = {update.client: update.samples for update in updates}
        secure = aggregate(strategy, Updates(masked[0], again), masked[0], samples, 4, masked[1])
        for name in SHAPES:
            step = (result.state[name] - plain[0][name]).double()
            other = (secure.state[name] - masked[0][name]).double()
            # Weights of fedcmp's bad client are at the floor, so that the second sum matters.
            assert float((step - other).norm() / step.norm()) < 1e-4, name
        assert secure.figures.keys() == result.figures.keys()
        plain, masked = (result.state, result.memory), (secure.state, secure.memory)
    if component.get("reliability", "client") == "client" and component["name"] == "fedcmp":
        assert secure.figures["reliability"]["c4"] == pytest.approx(0.02)


def test_what_a_strategy_makes_of_sums_is_checked() -> None:
    """As in the clear: nothing of another form goes on to the next round."""

    class Odd(FedAvg):
        def aggregate(self, state: State, updates: Sequence[Update], memory: Memory) -> Aggregate:
            return Aggregate({}, memory)

    state = draw(0)
    updates = contrary(state, 0)
    results = [LocalResult(u.client, {}, None, u.samples, 1, None, None) for u in updates]
    samples = {update.client: update.samples for update in updates}
    secure = Secure(Updates(state, updates), 0.5)
    with pytest.raises(ComponentError, match=r"Odd.*aggregate returned a state with other keys"):
        aggregated(Odd(), Progress(state), results, samples, secure)
    assert aggregated(FedAvg(), Progress(state), results, samples, secure).state.keys() == state.keys()


def test_long_updates_are_shortened_in_the_sums() -> None:
    """Every client says its norm; whoever does not is left out, and what is no norm is refused."""
    state = draw(0)
    updates = contrary(state, 0, length=50.0)
    samples = {update.client: update.samples for update in updates}
    strategy = STRATEGIES.build(Component(name="fedcmp", warmup=0), "strategy")
    clients, said = Updates(state, updates), {}

    def speaking(requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        answers = clients(requests)
        if next(iter(requests.values()))["step"] == "norm":
            answers |= said
            answers = {name: each for name, each in answers.items() if each}
        return answers

    plain = strategy.aggregate(state, updates, {})
    secure = aggregate(strategy, speaking, state, samples, 3, {})
    assert secure.figures["clip"] == pytest.approx(plain.figures["clip"])
    assert secure.figures["clip"]["c4"] < 0.03
    for name in SHAPES:
        step = (plain.state[name] - state[name]).norm()
        assert float((secure.state[name] - plain.state[name]).norm() / step) < 1e-4, name
    said["c1"] = {}
    others = strategy.aggregate(state, [update for update in updates if update.client != "c1"], {})
    silent = aggregate(strategy, speaking, state, samples, 3, {})
    for name in SHAPES:
        step = (others.state[name] - state[name]).norm()
        assert float((silent.state[name] - others.state[name]).norm() / step) < 1e-4, name
    with pytest.raises(DroppedOutError, match="needs 5 clients, and 4 said how long"):
        aggregate(strategy, speaking, state, samples, 5, {})
    said["c1"] = {"norm": float("nan")}
    with pytest.raises(DivergedError, match="client 'c1' has an update of norm nan"):
        aggregate(strategy, speaking, state, samples, 3, {})


def test_a_client_lost_between_the_sums_is_left_out_of_the_second() -> None:
    state = draw(0)
    updates = contrary(state, 0)
    clients = Updates(state, updates)
    strategy = STRATEGIES.build(Component(name="fedcmp", warmup=0), "strategy")
    sessions = []

    def losing(requests: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        step = next(iter(requests.values()))["step"]
        sessions.append(step)
        if sessions.count("advertise") == 2:
            requests = {name: request for name, request in requests.items() if name != "c4"}
        return clients(requests)

    samples = {update.client: update.samples for update in updates}
    secure = aggregate(strategy, losing, state, samples, 3, {})
    plain = strategy.aggregate(state, updates, {})
    # Its weight is at the floor, so little is lost with it.
    for name in SHAPES:
        step = plain.state[name] - state[name]
        assert float((secure.state[name] - plain.state[name]).norm() / step.norm()) < 0.05


def test_what_one_update_is_needed_for_is_not_secure() -> None:
    for component in ({"name": "krum"}, {"name": "fedcmp", "reliability": "direction"}, {"name": "scaffold"}):
        assert STRATEGIES.build(Component(**component), "strategy").sees() == "updates"
    assert torch.is_tensor(draw(0)["linear_1.weight"])
