"""Contracts of the family of strategies, and Fed-CMP's invariants (docs/fed_cmp.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federate.strategies.base import STRATEGIES, Aggregate, Memory, State, Strategy, Update, check
from federate.strategies.fedavg import FedAvg
from federate.strategies.fedcmp import FedCmp, agreement, canonical_basis
from pipeline.config import Component

SHAPES = {"linear_1.weight": (6, 4), "linear_1.bias": (6,), "linear_2.weight": (6, 6), "linear_2.bias": (6,)}
NAMES = STRATEGIES.names()
PLAIN = {
    "reliability": False,
    "equalise": 0.0,
    "basis_momentum": 0.0,
    "momentum": 0.0,
    "server_learning_rate": 1.0,
}


def draw(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def clients(
    number: int, seed: int = 0, samples: Sequence[int] = (3, 5, 2, 7, 1, 4, 6, 8, 9, 10)
) -> list[Update]:
    return [Update(f"c{k}", draw(100 * seed + k + 1), samples[k]) for k in range(number)]


def make(name: str, **options: object) -> Strategy:
    return STRATEGIES.build(Component(name=name, **options), "federate.strategy")  # type: ignore[arg-type]


def rounds(strategy: Strategy, number: int, of: Callable[[int], list[Update]]) -> Aggregate:
    result = Aggregate(draw(0), {})
    for round_ in range(number):
        result = strategy.aggregate(result.state, of(round_), result.memory)
    return result


def assert_same(a: State, b: State, tolerance: float = 1e-6) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_order_of_clients_does_not_matter(self, name: str) -> None:
        strategy = make(name)
        forward = rounds(strategy, 3, lambda r: clients(5, r))
        backward = rounds(strategy, 3, lambda r: clients(5, r)[::-1])
        for key in SHAPES:
            assert torch.equal(forward.state[key], backward.state[key])
        assert forward.figures == {n: backward.figures[n] for n in forward.figures}

    def test_inputs_are_untouched_and_dtypes_kept(self, name: str) -> None:
        strategy = make(name)
        first = rounds(strategy, 1, lambda r: clients(4))
        state, updates = draw(9), clients(4, 2)
        copies = [{k: v.clone() for k, v in each.items()} for each in (state, first.memory)]
        sent = [{k: v.clone() for k, v in update.state.items()} for update in updates]
        result = strategy.aggregate(state, updates, first.memory)
        for before, after in zip(
            [*copies, *sent], [state, first.memory, *(u.state for u in updates)], strict=True
        ):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
        assert {k: (v.shape, v.dtype) for k, v in result.state.items()} == {
            k: (v.shape, v.dtype) for k, v in state.items()
        }
        assert all(isinstance(value, torch.Tensor) for value in result.memory.values())

    def test_scaling_all_samples_changes_nothing(self, name: str) -> None:
        strategy = make(name)
        many = [Update(u.client, u.state, 1000 * u.samples) for u in clients(4)]
        assert_same(
            strategy.aggregate(draw(0), clients(4), {}).state, strategy.aggregate(draw(0), many, {}).state
        )

    def test_memory_survives_a_checkpoint(self, name: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
        strategy = make(name)
        half = rounds(strategy, 2, lambda r: clients(4, r))
        torch.save(half.memory, tmp_path / "memory.pt")
        memory: Memory = torch.load(tmp_path / "memory.pt", weights_only=True)
        straight = strategy.aggregate(half.state, clients(4, 9), half.memory)
        resumed = strategy.aggregate(half.state, clients(4, 9), memory)
        assert all(torch.equal(straight.state[key], resumed.state[key]) for key in SHAPES)

    def test_figures_name_every_client(self, name: str) -> None:
        result = make(name).aggregate(draw(0), clients(4), {})
        for figure in result.figures.values():
            assert set(figure) == {"c0", "c1", "c2", "c3"}
        assert sum(result.figures["weight"].values()) == pytest.approx(1)

    def test_clients_that_did_not_move_leave_the_projector(self, name: str) -> None:
        state = draw(0)
        still = [Update(f"c{k}", {n: t.clone() for n, t in state.items()}, 2) for k in range(3)]
        assert_same(make(name).aggregate(state, still, {}).state, state)


@pytest.mark.parametrize("name", ["fedavg", "centralised", "local_only"])
def test_averages_give_identical_clients_back(name: str) -> None:
    same = [Update(f"c{k}", draw(5), k + 1) for k in range(4)]
    assert_same(make(name).aggregate(draw(0), same, {}).state, draw(5))


def test_fedavg_by_hand() -> None:
    state = {"w": torch.tensor([[1.0, 2.0]])}
    updates = [
        Update("a", {"w": torch.tensor([[3.0, 2.0]])}, 1),
        Update("b", {"w": torch.tensor([[1.0, 6.0]])}, 3),
    ]
    assert FedAvg().aggregate(state, updates, {}).state["w"].tolist() == [[1.5, 5.0]]
    twice = FedAvg(server_learning_rate=2.0).aggregate(state, updates, {})
    assert twice.state["w"].tolist() == [[2.0, 8.0]]


@pytest.mark.parametrize("size", [{"rank": 1}, {"rank": 3}, {"energy": 0.5}, {}])
def test_fedcmp_with_its_parts_off_is_fedavg(size: dict) -> None:
    fedcmp = FedCmp(**size, **PLAIN)
    ours = rounds(fedcmp, 3, lambda r: clients(5, r))
    assert_same(ours.state, rounds(FedAvg(), 3, lambda r: clients(5, r)).state)


def test_fedcmp_of_one_client_is_that_client() -> None:
    off = PLAIN | {"reliability": True}
    assert_same(FedCmp(**off).aggregate(draw(0), clients(1), {}).state, clients(1)[0].state)


def test_fedcmp_of_identical_clients() -> None:
    state, same = draw(0), [Update(f"c{k}", draw(5), k + 1) for k in range(3)]
    off = PLAIN | {"reliability": True}
    assert_same(FedCmp(**off).aggregate(state, same, {}).state, draw(5))
    equalised = FedCmp(**(PLAIN | {"equalise": 1.0})).aggregate(state, same, {}).state
    for name in ("linear_1.weight", "linear_2.weight"):
        moved, given_ = equalised[name] - state[name], draw(5)[name] - state[name]
        assert float(moved.norm()) == pytest.approx(float(given_.norm()), rel=1e-5)
        u, _, v = torch.linalg.svd(given_, full_matrices=False)
        inside = u.T @ moved @ v.T
        torch.testing.assert_close(inside, torch.diag(inside.diag()), rtol=0, atol=1e-4)
        assert bool((inside.diag() > 0).all())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(2, 5))
def test_fedcmp_turns_with_the_embedding_space(seed: int, number: int) -> None:
    """Replacing every D_k by Q D_k gives Q times the step, also with all parts on."""
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double())
    zero = {"w": torch.zeros(6, 4, dtype=torch.float64)}
    generator = torch.Generator().manual_seed(seed + 1)
    deltas = [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(number)]

    def step(turn: torch.Tensor) -> torch.Tensor:
        updates = [Update(f"c{k}", {"w": turn @ delta}, k + 1) for k, delta in enumerate(deltas)]
        return FedCmp(warmup=0).aggregate(zero, updates, {}).state["w"]

    torch.testing.assert_close(step(q), q @ step(torch.eye(6, dtype=torch.float64)), rtol=1e-6, atol=1e-8)


def test_splitting_a_client_changes_nothing_without_reliability() -> None:
    strategy = FedCmp(reliability=False)
    whole = clients(3, samples=(4, 2, 6))
    parts = [Update("c0a", whole[0].state, 2), Update("c0b", whole[0].state, 2), *whole[1:]]
    assert_same(
        strategy.aggregate(draw(0), whole, {}).state, strategy.aggregate(draw(0), parts, {}).state, 1e-5
    )


@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.7}, {}])
def test_the_basis_stays_orthonormal(size: dict) -> None:
    result = rounds(FedCmp(**size), 8, lambda r: clients(4, r))
    for name in ("linear_1.weight", "linear_2.weight"):
        basis, spectrum = canonical_basis(result.memory[f"gram/{name}"], **size)
        identity = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-6)
        assert bool((spectrum[:-1] >= spectrum[1:]).all())


def test_canonical_basis_by_hand() -> None:
    gram = torch.diag(torch.tensor([1.0, 6.0, 3.0], dtype=torch.float64))
    cases = [({"rank": 1}, 1), ({"rank": 2}, 2), ({"rank": 99}, 3), ({}, 3), ({"rank": 1, "energy": 0.9}, 1)]
    cases += [({"energy": share}, size) for share, size in ((0.6, 1), (0.61, 2), (0.9, 2), (0.95, 3))]
    for options, size in cases:
        basis, spectrum = canonical_basis(gram, **options)
        assert basis.shape == (3, size)
        assert spectrum.tolist() == pytest.approx([6.0, 3.0, 1.0][:size])


def test_agreement_by_hand() -> None:
    east, north = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    shares = {"a": 0.25, "b": 0.25, "c": 0.5}
    cosines = agreement({"a": east, "b": east, "c": -north}, shares)
    assert cosines["a"] == pytest.approx(0.25 / (0.25**2 + 0.5**2) ** 0.5)
    assert cosines["c"] == pytest.approx(0.0)
    assert agreement({"a": east}, {"a": 1.0}) == {"a": 1.0}


def test_a_contrarian_loses_its_weight_after_the_warm_up() -> None:
    base, direction = draw(0), draw(1)

    def of(round_: int, state: State) -> list[Update]:
        noise = [draw(50 * round_ + k + 2) for k in range(5)]
        signs = (1, 1, 1, 1, -1)
        return [
            Update(f"c{k}", {n: state[n] + signs[k] * direction[n] + 0.2 * noise[k][n] for n in state}, 5)
            for k in range(5)
        ]

    strategy = FedCmp(warmup=1)
    first = strategy.aggregate(base, of(0, base), {})
    assert set(first.figures["reliability"].values()) == {1.0}
    second = strategy.aggregate(first.state, of(1, first.state), first.memory)
    assert second.figures["reliability"]["c4"] == pytest.approx(0.02)
    assert min(second.figures["reliability"][f"c{k}"] for k in range(4)) == 1.0
    assert second.figures["weight"]["c4"] < 0.01


def test_updates_that_would_spoil_are_refused() -> None:
    state = draw(0)
    bad = draw(1)
    bad["linear_1.bias"] = bad["linear_1.bias"].clone()
    bad["linear_1.bias"][2] = float("nan")
    cases = {
        "no client": [],
        "client 'x' sent values that are not finite in linear_1.bias": [Update("x", bad, 1)],
        "client 'x' sent other keys": [Update("x", {"w": torch.zeros(2)}, 1)],
        "client 'x' reports 0 samples": [Update("x", draw(1), 0)],
        r"client 'x' sent linear_1.weight of shape \(6,\)": [
            Update("x", draw(1) | {"linear_1.weight": torch.zeros(6)}, 1)
        ],
    }
    for message, updates in cases.items():
        with pytest.raises(ValueError, match=message):
            check(state, updates)
