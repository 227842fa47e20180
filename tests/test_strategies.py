"""Contracts that every strategy keeps; Fed-CMP's own are in test_fedcmp.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmp.federate.arithmetic.updates import Memory, State, Update, check
from fedcmp.federate.strategies.base import STRATEGIES, Aggregate, Strategy
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.pipeline.options import Component

SHAPES = {"linear_1.weight": (6, 4), "linear_1.bias": (6,), "linear_2.weight": (6, 6), "linear_2.bias": (6,)}
SAMPLES = (3, 5, 2, 7, 1, 4, 6, 8, 9, 10)
NAMES = STRATEGIES.names()
# What a client that sends what it got gets back when all others send the same.
GIVES_BACK = ["centralised", "fedavg", "fednova", "fedprox", "krum", "local_only", "median", "multi_krum"]
GIVES_BACK += ["norm_clipping", "pivotmerge", "scaffold", "trimmed_mean"]


def draw(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def update(client: str, state: State, samples: int, seed: int = 0) -> Update:
    """With everything a strategy may want."""
    alignment = {name: 0.1 * (1 + seed % 3) for name in SHAPES if name.endswith("weight")}
    return Update(client, state, samples, 1 + seed % 2, draw(seed + 50), alignment)


def clients(number: int, seed: int = 0) -> list[Update]:
    return [update(f"c{k}", draw(100 * seed + k + 1), SAMPLES[k], 100 * seed + k) for k in range(number)]


def make(name: str, **options: object) -> Strategy:
    return STRATEGIES.build(Component(name=name, **options), "federate.strategy")  # type: ignore[arg-type]


def begun(strategy: Strategy) -> Aggregate:
    state = draw(0)
    return Aggregate(state, strategy.begin(state, {f"c{k}": n for k, n in enumerate(SAMPLES)}))


def rounds(strategy: Strategy, number: int, of: Callable[[int], list[Update]]) -> Aggregate:
    result = begun(strategy)
    for round_ in range(number):
        result = strategy.aggregate(result.state, of(round_), result.memory)
    return result


def assert_same(a: State, b: State, tolerance: float = 1e-6) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    @settings(max_examples=5, deadline=None)
    @given(order=st.permutations(range(5)))
    def test_order_of_clients_does_not_matter(self, name: str, order: list[int]) -> None:
        strategy = make(name)
        forward = rounds(strategy, 3, lambda r: clients(5, r))
        other = rounds(strategy, 3, lambda r: [clients(5, r)[place] for place in order])
        for key in SHAPES:
            assert torch.equal(forward.state[key], other.state[key])
        assert forward.figures == {n: other.figures[n] for n in forward.figures}

    def test_inputs_are_untouched_and_dtypes_kept(self, name: str) -> None:
        strategy = make(name)
        first = rounds(strategy, 1, lambda r: clients(4))
        state, updates = draw(9), clients(4, 2)
        given_: list[State] = [state, first.memory]
        for each in updates:
            assert each.gradient is not None
            given_ += [each.state, each.gradient]
        copies = [{key: tensor.clone() for key, tensor in each.items()} for each in given_]
        strategy.objective("c1", first.memory)
        result = strategy.aggregate(state, updates, first.memory)
        for before, after in zip(copies, given_, strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)
        assert {k: (v.shape, v.dtype) for k, v in result.state.items()} == {
            k: (v.shape, v.dtype) for k, v in state.items()
        }
        assert all(isinstance(value, torch.Tensor) for value in result.memory.values())

    def test_scaling_all_samples_changes_nothing(self, name: str) -> None:
        strategy = make(name)
        start = begun(strategy)
        many = [replace(each, samples=1000 * each.samples) for each in clients(4)]
        assert_same(
            strategy.aggregate(start.state, clients(4), start.memory).state,
            strategy.aggregate(start.state, many, start.memory).state,
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
        result = rounds(make(name), 1, lambda r: clients(4))
        for figure in result.figures.values():
            assert set(figure) == {"c0", "c1", "c2", "c3"}
        if "weight" in result.figures:
            assert sum(result.figures["weight"].values()) == pytest.approx(1)

    def test_clients_that_did_not_move_leave_the_projector(self, name: str) -> None:
        strategy = make(name)
        start = begun(strategy)
        still = [update(f"c{k}", {n: t.clone() for n, t in start.state.items()}, 2) for k in range(3)]
        assert_same(strategy.aggregate(start.state, still, start.memory).state, start.state)

    @pytest.mark.parametrize("number", [1, 2, 10])
    def test_few_and_many_clients(self, name: str, number: int) -> None:
        """One client; two; more than the matrices have rows."""
        result = rounds(make(name), 3, lambda r: clients(number, r))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in result.state.values())

    def test_clients_come_and_go(self, name: str) -> None:
        strategy = make(name)
        result = begun(strategy)
        for round_, there in enumerate(([0, 1, 2], [3, 4], [1], [0, 5, 6, 7])):
            chosen = [clients(8, round_)[place] for place in there]
            for each in chosen:
                linear = strategy.objective(each.client, result.memory).linear
                assert linear is None or {n: t.shape for n, t in linear.items()} == SHAPES
            result = strategy.aggregate(result.state, chosen, result.memory)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in result.state.values())

    def test_every_strategy_takes_the_proximal_term(self, name: str) -> None:
        strategy = make(name, proximal=0.5)
        plain = make(name, proximal=0.0)
        memory = begun(strategy).memory
        pull = strategy.objective("c0", memory).proximal - plain.objective("c0", memory).proximal
        assert pull == pytest.approx(0.5)


@pytest.mark.parametrize("name", GIVES_BACK)
@pytest.mark.parametrize("number", [1, 4])
def test_identical_clients_are_given_back(name: str, number: int) -> None:
    strategy = make(name)
    start = begun(strategy)
    same = [update(f"c{k}", draw(5), k + 1) for k in range(number)]
    assert_same(strategy.aggregate(start.state, same, start.memory).state, draw(5), 1e-5)


def test_fedavg_by_hand() -> None:
    state = {"w": torch.tensor([[1.0, 2.0]])}
    updates = [
        Update("a", {"w": torch.tensor([[3.0, 2.0]])}, 1),
        Update("b", {"w": torch.tensor([[1.0, 6.0]])}, 3),
    ]
    assert FedAvg().aggregate(state, updates, {}).state["w"].tolist() == [[1.5, 5.0]]
    twice = FedAvg(server_learning_rate=2.0).aggregate(state, updates, {})
    assert twice.state["w"].tolist() == [[2.0, 8.0]]


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
        "client 'x' sent values that are not finite in the gradient of linear_1.bias": [
            Update("x", draw(1), 1, gradient=bad)
        ],
        "client 'x' sent an alignment of linear_1.weight that is not finite": [
            Update("x", draw(1), 1, alignment={"linear_1.weight": float("nan")})
        ],
    }
    for message, updates in cases.items():
        with pytest.raises(ValueError, match=message):
            check(state, updates)
