"""Fed-CMP's invariants under every switch (docs/fed_cmp.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_strategies import SHAPES, assert_same, clients, draw, rounds

from fedcmp.federate.arithmetic.bases import (
    agreement_by_direction,
    canonical_basis,
    fuse_by_direction,
    leading,
    polar,
    randomised_basis,
)
from fedcmp.federate.arithmetic.matrices import Matrices, agreement
from fedcmp.federate.arithmetic.norms import factors, norm, usual_norms
from fedcmp.federate.arithmetic.updates import State, Update, data_weights
from fedcmp.federate.strategies.base import Aggregate
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.federate.strategies.fedcmp import FedCmp

PLAIN = {
    "clip": 0.0,
    "reliability": "none",
    "equalise": 0.0,
    "length": "fused",
    "basis_momentum": 0.0,
    "momentum": 0.0,
    "server_learning_rate": 1.0,
}
# The first formulation, before both sides were equalised (configs/ablations/parts.toml).
V1 = {
    "update": "weights",
    "proximal": 0.0,
    "sides": "left",
    "floor": 1e-3,
    "length": "fused",
    "momentum": 0.3,
    "server_learning_rate": 1.5,
    "bias_learning_rate": 1.5,
}
SWITCHES: list[dict] = [
    {},
    V1,
    V1 | {"rank": 3, "momentum_kind": "procrustes"},
    V1 | {"basis": "randomised", "rank": 4},
    {"sides": "left"},
    {"length": "fused", "momentum": 0.3},
    {"momentum": 0.3, "rank": 3},
    {"clip": 0.0},
    {"clip": 1.0, "reliability": "direction", "warmup": 0, "space": "weights"},
    {"warmup": 0},
    {"reliability": "none"},
    {"reliability": "direction", "warmup": 0},
    {"reliability": "direction", "warmup": 0, "rank": 2, "residual": False},
    {"space": "weights"},
    {"residual": False, "rank": 3},
    {"residual": False, "rank": 3, "equalise": 0.0},
    {"energy": 0.6},
    {"momentum": 0.3, "momentum_kind": "plain", "rank": 3},
    {"momentum": 0.3, "momentum_kind": "procrustes", "rank": 3},
    {"momentum": 0.3, "momentum_kind": "procrustes", "energy": 0.7},
    {"basis": "randomised", "rank": 4},
    {"basis": "randomised", "rank": 4, "basis_momentum": 0.0},
    {"basis": "randomised", "rank": 4, "momentum": 0.3, "momentum_kind": "procrustes", "space": "weights"},
    {"basis": "randomised", "energy": 0.7, "reliability": "direction", "warmup": 0},
    {"equalise": 0.0, "basis_momentum": 0.0, "momentum": 0.0},
]
# Taller than the sketch of rank 4, so that it is a sketch; one matrix wide, one narrow.
TALL = {"linear_1.weight": (40, 6), "linear_1.bias": (40,), "linear_2.weight": (40, 60)}


def described(options: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


every_switch = pytest.mark.parametrize("options", SWITCHES, ids=described)


def tall(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in TALL.items()}


def of_round(round_: int, number: int = 5) -> list[Update]:
    """Clients with something in common, so that reliability has something to judge by."""
    common = tall(7)
    own = [tall(100 * round_ + k + 10) for k in range(number)]
    return [
        Update(f"c{k}", {name: common[name] + (0.3 + 0.2 * k) * each[name] for name in TALL}, k + 1)
        for k, each in enumerate(own)
    ]


def run(strategy: FedCmp, number: int, of: Callable[[int], list[Update]] = of_round) -> Aggregate:
    result = Aggregate(tall(0), {})
    for round_ in range(number):
        result = strategy.aggregate(result.state, of(round_), result.memory)
    return result


def matrices(*tensors: torch.Tensor) -> Matrices:
    return Matrices({f"c{k}": tensor.double() for k, tensor in enumerate(tensors)}, None)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_switch
class TestEverySwitch:
    def test_order_of_clients_does_not_matter(self, options: dict) -> None:
        forward = run(FedCmp(**options), 3)
        backward = run(FedCmp(**options), 3, lambda round_: of_round(round_)[::-1])
        for ours, theirs in ((forward.state, backward.state), (forward.memory, backward.memory)):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert forward.figures == backward.figures

    def test_global_random_numbers_are_neither_used_nor_spent(self, options: dict) -> None:
        torch.manual_seed(1)
        first, after = run(FedCmp(**options), 2), torch.get_rng_state()
        torch.manual_seed(1)
        assert torch.equal(after, torch.get_rng_state())
        torch.manual_seed(2)
        second = run(FedCmp(**options), 2)
        assert all(torch.equal(first.state[name], second.state[name]) for name in TALL)

    def test_inputs_are_untouched(self, options: dict) -> None:
        half = run(FedCmp(**options), 1)
        updates = of_round(1)
        all_inputs = [half.state, half.memory, *(update.state for update in updates)]
        copies = [{key: tensor.clone() for key, tensor in each.items()} for each in all_inputs]
        FedCmp(**options).aggregate(half.state, updates, half.memory)
        for before, after in zip(copies, all_inputs, strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)

    def test_a_checkpoint_changes_nothing(self, options: dict, tmp_path) -> None:  # type: ignore[no-untyped-def]
        half = run(FedCmp(**options), 2)
        torch.save(half.memory, tmp_path / "memory.pt")
        memory = torch.load(tmp_path / "memory.pt", weights_only=True)
        straight = FedCmp(**options).aggregate(half.state, of_round(2), half.memory)
        resumed = FedCmp(**options).aggregate(half.state, of_round(2), memory)
        assert all(torch.equal(straight.state[name], resumed.state[name]) for name in TALL)

    def test_clients_that_did_not_move_leave_the_projector(self, options: dict) -> None:
        """In the first round; later, momentum goes on, and nothing becomes NaN."""
        state = tall(0)
        still = [Update(f"c{k}", {n: t.clone() for n, t in state.items()}, 2) for k in range(3)]
        result = FedCmp(**options).aggregate(state, still, {})
        assert_same(result.state, state)
        result = FedCmp(**options).aggregate(state, of_round(1, 3), result.memory)
        still = [Update(f"c{k}", {n: t.clone() for n, t in result.state.items()}, 2) for k in range(3)]
        result = FedCmp(**options).aggregate(result.state, still, result.memory)
        for tensors in (result.state, result.memory):
            assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())

    def test_scaling_all_samples_changes_nothing(self, options: dict) -> None:
        many = [Update(u.client, u.state, 1000 * u.samples) for u in of_round(0)]
        few = FedCmp(**options).aggregate(tall(0), of_round(0), {})
        assert_same(FedCmp(**options).aggregate(tall(0), many, {}).state, few.state)

    def test_clients_may_come_and_go(self, options: dict) -> None:
        result = FedCmp(**options).aggregate(tall(0), of_round(0), {})
        for round_, number in ((1, 3), (2, 1), (3, 5)):
            result = FedCmp(**options).aggregate(result.state, of_round(round_, number), result.memory)
            assert set(result.figures["weight"]) == {f"c{k}" for k in range(number)}
            assert sum(result.figures["weight"].values()) == pytest.approx(1)
            assert all(0.02 - 1e-9 <= r <= 1 + 1e-9 for r in result.figures["reliability"].values())


@pytest.mark.parametrize("size", [{"rank": 1}, {"rank": 3}, {"energy": 0.5}, {}], ids=described)
@pytest.mark.parametrize("kind", ["projected", "plain", "procrustes"])
@pytest.mark.parametrize("space", ["updates", "weights"])
@pytest.mark.parametrize("basis", ["exact", "randomised"])
@pytest.mark.parametrize("sides", ["both", "left"])
def test_with_its_parts_off_it_is_fedavg(sides: str, basis: str, space: str, kind: str, size: dict) -> None:
    ours = FedCmp(**PLAIN | size, sides=sides, basis=basis, space=space, momentum_kind=kind)
    result = run(ours, 3)
    average = FedAvg().aggregate(tall(0), of_round(2), {})
    assert_same(result.state, average.state)


@pytest.mark.parametrize("reliability", ["client", "direction"])
@pytest.mark.parametrize("basis", ["exact", "randomised"])
def test_one_client_gives_its_own_projector(reliability: str, basis: str) -> None:
    strategy = FedCmp(**PLAIN | {"reliability": reliability, "basis": basis, "rank": 4, "warmup": 0})
    assert_same(strategy.aggregate(tall(0), of_round(0, 1), {}).state, of_round(0, 1)[0].state, 1e-5)


def test_identical_clients() -> None:
    state, same = draw(0), [Update(f"c{k}", draw(5), k + 1) for k in range(3)]
    for reliability in ("client", "direction"):
        off = PLAIN | {"reliability": reliability, "warmup": 0}
        assert_same(FedCmp(**off).aggregate(state, same, {}).state, draw(5), 1e-5)
    for options, rate in ((PLAIN | {"equalise": 1.0}, 1.0), (PLAIN | V1, 1.5), ({"clip": 0.0}, 1.35)):
        equalised = FedCmp(**options | {"server_learning_rate": rate}).aggregate(state, same, {}).state
        for name in ("linear_1.weight", "linear_2.weight"):
            moved, given_ = equalised[name] - state[name], draw(5)[name] - state[name]
            assert float(moved.norm()) == pytest.approx(rate * float(given_.norm()), rel=1e-5)
            u, _, v = torch.linalg.svd(given_, full_matrices=False)
            inside = u.T @ moved @ v.T
            torch.testing.assert_close(inside, torch.diag(inside.diag()), rtol=0, atol=1e-3)
            assert bool((inside.diag() > 0).all())


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 5),
    reliability=st.sampled_from(["client", "direction", "none"]),
    kind=st.sampled_from(["projected", "plain", "procrustes"]),
    size=st.sampled_from([{}, {"rank": 2}, {"energy": 0.6}, {"rank": 2, "residual": False}]),
    version=st.sampled_from([{}, {"momentum": 0.3}, V1]),
)
def test_it_turns_with_the_spaces_on_both_sides(
    seed: int, number: int, reliability: str, kind: str, size: dict, version: dict
) -> None:
    """Replacing every D_k by Q D_k R gives Q times the steps times R, also with all parts on."""
    turn, _ = torch.linalg.qr(random(6, 6, seed=seed))
    other, _ = torch.linalg.qr(random(9, 9, seed=seed + 1))
    changes = [[random(6, 9, seed=seed + 10 * r + k + 2) for k in range(number)] for r in range(2)]

    def end(turn: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        state, memory = {"w": torch.zeros(6, 9, dtype=torch.float64)}, {}
        strategy = FedCmp(**version | size, warmup=0, reliability=reliability, momentum_kind=kind)
        for each in changes:
            updates = [
                Update(f"c{k}", {"w": state["w"] + turn @ d @ other}, k + 1) for k, d in enumerate(each)
            ]
            result = strategy.aggregate(state, updates, memory)
            state, memory = result.state, result.memory
        return state["w"]

    plain = end(torch.eye(6).double(), torch.eye(9).double())
    torch.testing.assert_close(end(turn, other), turn @ plain @ other, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 5),
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
)
def test_the_formulation_by_hand(seed: int, number: int, d_out: int, d_in: int) -> None:
    """Three rounds of docs/fed_cmp.md, written out; reliability and clip have tests of their own."""
    floor, b, rate, a = 0.1, 0.6, 1.35, 1.0
    start = torch.zeros(d_out, d_in).double()
    ours, memory = {"w": start}, {}
    plain, left, right, longest = start, None, None, 0.0
    for round_ in range(3):
        changes = [random(d_out, d_in, seed=seed + 7 * round_ + k) * (3 - round_) for k in range(number)]
        updates = [Update(f"c{k}", {"w": ours["w"] + d}, k + 1) for k, d in enumerate(changes)]
        result = FedCmp(reliability="none", clip=0.0).aggregate(ours, updates, memory)
        ours, memory = result.state, result.memory

        shares = [share for _, share in sorted(data_weights(updates).items())]
        grams = [sum(p * d @ d.T for p, d in zip(shares, changes, strict=True))]
        grams.append(sum(p * d.T @ d for p, d in zip(shares, changes, strict=True)))
        length = float(grams[0].trace()) ** 0.5
        longest = max(longest, length)
        new = [gram / gram.trace() for gram in grams]
        left = new[0] if left is None else b * left + (1 - b) * new[0]
        right = new[1] if right is None else b * right + (1 - b) * new[1]
        (e, u), (f, v) = torch.linalg.eigh(left), torch.linalg.eigh(right)
        c = u.T @ sum(p * d for p, d in zip(shares, changes, strict=True)) @ v
        c = (e.clamp(min=0) / e[-1] + floor)[:, None] ** (-a / 2) * c
        c = c * (f.clamp(min=0) / f[-1] + floor) ** (-a / 2)
        plain = plain + rate * (u @ c @ v.T) * (length * longest) ** 0.5 / c.norm()
        torch.testing.assert_close(ours["w"], plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("version", [{}, V1, {"rank": 3}], ids=described)
def test_scaling_all_updates_scales_every_step(version: dict) -> None:
    """Also over rounds: nothing in it has a length of its own."""

    def steps(factor: float) -> list[State]:
        state, memory, found = {n: 0 * t for n, t in tall(0).items()}, {}, []
        for round_ in range(3):
            moved = [
                Update(u.client, {n: state[n] + factor * t for n, t in u.state.items()}, u.samples)
                for u in of_round(round_)
            ]
            result = FedCmp(**version).aggregate(state, moved, memory)
            found.append({name: result.state[name] - state[name] for name in TALL})
            state, memory = result.state, result.memory
        return found

    for one, eight in zip(steps(1.0), steps(8.0), strict=True):
        assert_same({name: 8 * t for name, t in one.items()}, eight, 1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 4),
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    a=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_exact_is_the_svd_of_the_concatenation(
    seed: int, number: int, d_out: int, d_in: int, a: float
) -> None:
    """One side alone; also where there are fewer columns than rows (K · d_in < d_out)."""
    changes = [random(d_out, d_in, seed=seed + k) for k in range(number)]
    updates = [Update(f"c{k}", {"w": change}, k + 1) for k, change in enumerate(changes)]
    off = PLAIN | {"equalise": a, "sides": "left", "floor": 1e-3}
    ours = FedCmp(**off).aggregate({"w": torch.zeros(d_out, d_in).double()}, updates, {}).state["w"]

    shares = list(data_weights(updates).values())
    stacked = torch.cat([share**0.5 * d for share, d in zip(shares, changes, strict=True)], dim=1)
    u, singular, _ = torch.linalg.svd(stacked, full_matrices=False)
    c = u.T @ sum(share * d for share, d in zip(shares, changes, strict=True))
    equalised = ((singular**2 / singular[0] ** 2 + 1e-3) ** (-a / 2))[:, None] * c
    plain = u @ equalised * (c.norm() / equalised.norm())
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("space", ["updates", "weights"])
@pytest.mark.parametrize("rank", [None, 20])
def test_a_sketch_that_covers_the_rank_is_exact(space: str, rank: int | None) -> None:
    """Five clients of rank 1 a round: five directions, five rounds make 25, in a sketch of 36 or 40."""

    def of(round_: int) -> list[Update]:
        return [
            Update(
                f"c{k}",
                {"w": random(200, 1, seed=9 * round_ + k) @ random(1, 30, seed=9 * round_ + k + 99)},
                1,
            )
            for k in range(5)
        ]

    results = []
    for basis in ("exact", "randomised"):
        state, memory = {"w": torch.zeros(200, 30).double()}, {}
        for round_ in range(4):
            strategy = FedCmp(basis=basis, space=space, rank=rank, warmup=0)
            base = state["w"] if space == "updates" else 0.0
            moved = [Update(u.client, {"w": u.state["w"] + base}, 1) for u in of(round_)]
            result = strategy.aggregate(state, moved, memory)
            state, memory = result.state, result.memory
        results.append(state["w"])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_a_sketch_as_large_as_the_matrix_is_exact() -> None:
    small = rounds(FedCmp(basis="randomised"), 3, lambda round_: clients(5, round_))
    assert_same(small.state, rounds(FedCmp(), 3, lambda round_: clients(5, round_)).state, 1e-7)
    capped = rounds(FedCmp(basis="randomised", rank=3), 3, lambda round_: clients(5, round_))
    assert_same(capped.state, rounds(FedCmp(rank=3), 3, lambda round_: clients(5, round_)).state, 1e-7)


def test_another_seed_is_another_sketch() -> None:
    one, two = (run(FedCmp(basis="randomised", rank=4, seed=seed), 2) for seed in (0, 1))
    name = "linear_2.weight"
    assert not torch.equal(one.state[name], two.state[name])
    wide = f"vectors/{name}"
    assert not torch.equal(one.memory[wide], two.memory[wide])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 12), columns=st.integers(1, 20))
def test_randomised_basis_properties(seed: int, rank: int, columns: int) -> None:
    """Orthonormal, never more energy than there is, exact once it covers the rank."""
    factor = random(30, rank, seed=seed)
    gram = factor @ factor.T
    basis, spectrum = randomised_basis(lambda x: gram @ x, random(30, columns, seed=seed + 1))
    torch.testing.assert_close(basis.T @ basis, torch.eye(columns).double(), rtol=0, atol=1e-10)
    assert bool((spectrum[:-1] >= spectrum[1:]).all())
    best = torch.linalg.eigvalsh(gram).flip(0)[:columns]
    assert bool((spectrum <= best * (1 + 1e-9) + 1e-9).all())
    if columns >= rank:
        torch.testing.assert_close(spectrum, best.clamp(min=0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("basis", ["exact", "randomised"])
@pytest.mark.parametrize("size", [{"rank": 4}, {"energy": 0.7}, {"rank": 12}], ids=described)
def test_the_basis_stays_orthonormal(basis: str, size: dict) -> None:
    result = run(FedCmp(basis=basis, momentum=0.3, momentum_kind="procrustes", **size), 8)
    for name in ("linear_1.weight", "linear_2.weight"):
        for axis, width in enumerate(TALL[name]):
            u = result.memory[f"basis/{axis}/{name}"]
            torch.testing.assert_close(u.T @ u, torch.eye(u.shape[1]).double(), rtol=0, atol=1e-6)
            assert u.shape[0] == width
            assert u.shape[1] <= min(size.get("rank", width), width)


def test_procrustes_is_vacuous_at_full_rank_and_only_there() -> None:
    projected, plain, procrustes = (
        run(FedCmp(momentum=0.3, momentum_kind=kind), 4).state
        for kind in ("projected", "plain", "procrustes")
    )
    assert_same(procrustes, projected, 1e-5)
    assert_same(plain, projected, 1e-5)
    ends = [
        run(FedCmp(momentum=0.3, momentum_kind=kind, rank=3), 4).state
        for kind in ("projected", "plain", "procrustes")
    ]
    for one, two in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(ends[one]["linear_2.weight"], ends[two]["linear_2.weight"], atol=1e-3)


def test_momentum_by_hand() -> None:
    """The basis turns by a right angle: projection forgets the history, alignment turns it along."""
    east, north = torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    ends = {}
    for kind in ("projected", "plain", "procrustes"):
        strategy = FedCmp(**PLAIN | {"momentum": 0.5, "momentum_kind": kind, "rank": 1})
        first = strategy.aggregate({"w": 0 * east}, [Update("a", {"w": east}, 1)], {})
        moved = Update("a", {"w": first.state["w"] + north}, 1)
        ends[kind] = strategy.aggregate(first.state, [moved], first.memory).state["w"].flatten().tolist()
    assert ends["projected"] == pytest.approx([2, 1], abs=1e-6)
    assert ends["plain"] == pytest.approx([3, 1], abs=1e-6)
    # Between orthogonal directions the nearest rotation may turn either way.
    assert ends["procrustes"][0] == pytest.approx(2, abs=1e-6)
    assert abs(ends["procrustes"][1] - 1) == pytest.approx(1, abs=1e-6)


def test_what_lies_outside_the_basis_is_kept_or_dropped() -> None:
    for residual in (True, False):
        strategy = FedCmp(**PLAIN | {"rank": 2, "residual": residual})
        step = {
            name: strategy.aggregate(tall(0), of_round(0), {}).state[name] - tall(0)[name] for name in TALL
        }
        rank = int(torch.linalg.matrix_rank(step["linear_2.weight"].double(), atol=1e-3))
        assert rank == (40 if residual else 2)


def test_basis_of_weights_is_not_that_of_updates() -> None:
    far = {name: 10 * tensor for name, tensor in tall(3).items()}
    updates = [Update(u.client, {n: far[n] + u.state[n] for n in TALL}, u.samples) for u in of_round(0)]
    for space, source in (("updates", far), ("weights", dict.fromkeys(TALL))):
        off = {"rank": 3, "momentum_kind": "procrustes", "space": space}
        result = FedCmp(**PLAIN | off | {"momentum": 0.5}).aggregate(far, updates, {})
        name = "linear_2.weight"
        gram = Matrices.of(updates, name, source[name]).gram(data_weights(updates))
        expected, _ = canonical_basis(gram, 3)
        torch.testing.assert_close(result.memory[f"basis/0/{name}"].abs(), expected.abs(), rtol=0, atol=1e-6)


def test_splitting_a_client_changes_nothing_without_reliability() -> None:
    strategy = FedCmp(reliability="none")
    whole = [replace(each, samples=n) for each, n in zip(clients(3), (4, 2, 6), strict=True)]
    parts = [Update("c0a", whole[0].state, 2), Update("c0b", whole[0].state, 2), *whole[1:]]
    assert_same(
        strategy.aggregate(draw(0), whole, {}).state, strategy.aggregate(draw(0), parts, {}).state, 1e-5
    )


def test_canonical_basis_by_hand() -> None:
    gram = torch.diag(torch.tensor([1.0, 6.0, 3.0], dtype=torch.float64))
    cases = [({"rank": 1}, 1), ({"rank": 2}, 2), ({"rank": 99}, 3), ({}, 3), ({"rank": 1, "energy": 0.9}, 1)]
    cases += [({"energy": share}, size) for share, size in ((0.6, 1), (0.61, 2), (0.9, 2), (0.95, 3))]
    for options, size in cases:
        basis, spectrum = canonical_basis(gram, **options)
        assert basis.shape == (3, size)
        assert spectrum.tolist() == pytest.approx([6.0, 3.0, 1.0][:size])
    assert leading(torch.tensor([6.0, 3.0]), None, 0.99, 20.0) == 2


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (600, 3), (5, 2100), (1030, 1030)])
def test_sums_over_clients_piece_by_piece(rows: int, columns: int) -> None:
    """Across the edges of blocks, in float64 and, above 1024 rows, in float32."""
    old = random(rows, columns, seed=9).float()
    updates = [Update(name, {"w": random(rows, columns, seed=k).float()}, 1) for k, name in enumerate("cab")]
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    ours = Matrices.of(updates, "w", old)
    assert list(ours.new) == ["a", "b", "c"]
    assert ours.dtype == (torch.float32 if rows > 1024 else torch.float64)
    deltas = {u.client: u.state["w"].double() - old.double() for u in updates}
    gram = sum(weights[client] * d @ d.T for client, d in deltas.items())
    right = random(rows, 3, seed=5).to(ours.dtype)
    total = sum(weights[client] * d for client, d in deltas.items())
    for got, expected in (
        (ours.sum(weights), total),
        (ours.gram(weights), gram),
        (ours.gram(weights).T, gram),
        (ours.gram_times(weights, right), gram @ right.double()),
    ):
        assert got.dtype == ours.dtype
        assert float((got - expected).norm() / expected.norm()) < (1e-6 if rows > 1024 else 1e-13)
    assert ours.trace(weights) == pytest.approx(float(gram.trace()), rel=1e-6)


def test_agreement_by_hand() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    shares = {"c0": 0.25, "c1": 0.25, "c2": 0.5}
    cosines = agreement(matrices(east, east, -north), shares)
    assert cosines["c0"] == pytest.approx(0.25 / (0.25**2 + 0.5**2) ** 0.5)
    assert cosines["c2"] == pytest.approx(0.0)
    assert agreement(matrices(east), {"c0": 1.0}) == {"c0": 1.0}
    assert agreement(matrices(east, 0 * east), {"c0": 0.3, "c1": 0.7}) == {"c0": 0.0, "c1": 0.0}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), number=st.integers(2, 4))
def test_agreement_by_direction_is_agreement_of_rows(seed: int, number: int) -> None:
    changes = [random(5, 7, seed=seed + k) for k in range(number)]
    shares = {f"c{k}": (k + 1) / (number * (number + 1) / 2) for k in range(number)}
    basis, _ = torch.linalg.qr(random(5, 3, seed=seed + 9))
    ours = agreement_by_direction(matrices(*changes), shares, basis)
    for i in range(3):
        row = agreement(matrices(*((basis.T @ d)[i : i + 1] for d in changes)), shares)
        assert ours[:, i].tolist() == pytest.approx(list(row.values()), abs=1e-9)
    weights = torch.rand(number, 3, generator=torch.Generator().manual_seed(seed)).double()
    fused = fuse_by_direction(matrices(*changes), weights, basis)
    expected = sum(w[:, None] * (basis.T @ d) for w, d in zip(weights, changes, strict=True))
    torch.testing.assert_close(fused, expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_polar_is_the_nearest_isometry(seed: int, rows: int, columns: int) -> None:
    matrix = random(rows, columns, seed=seed)
    nearest = polar(matrix)
    ones = torch.linalg.svdvals(nearest)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    assert float((nearest * matrix).sum()) == pytest.approx(float(torch.linalg.svdvals(matrix).sum()))


def contrary(round_: int, state: State) -> list[Update]:
    """Four clients that agree and one that goes the other way."""
    direction, noise = draw(1), [draw(50 * round_ + k + 2) for k in range(5)]
    signs = (1, 1, 1, 1, -1)
    return [
        Update(f"c{k}", {n: state[n] + signs[k] * direction[n] + 0.2 * noise[k][n] for n in SHAPES}, 5)
        for k in range(5)
    ]


def test_a_contrarian_loses_its_weight_after_the_warm_up() -> None:
    base, strategy = draw(0), FedCmp(warmup=1)
    first = strategy.aggregate(base, contrary(0, base), {})
    assert set(first.figures["reliability"].values()) == {1.0}
    second = strategy.aggregate(first.state, contrary(1, first.state), first.memory)
    assert second.figures["reliability"]["c4"] == pytest.approx(0.02)
    assert min(second.figures["reliability"][f"c{k}"] for k in range(4)) == 1.0
    assert second.figures["weight"]["c4"] < 0.01


def test_a_contrarian_loses_its_weight_by_direction() -> None:
    base = draw(0)
    first = FedCmp(reliability="direction").aggregate(base, contrary(0, base), {})
    assert set(first.figures["reliability"].values()) == {1.0}
    result = FedCmp(reliability="direction", warmup=0).aggregate(base, contrary(0, base), {})
    r = result.figures["reliability"]
    assert r["c4"] < 0.1 < 0.9 < min(r[f"c{k}"] for k in range(4))


def test_a_direction_in_which_one_client_errs_costs_it_only_that_direction() -> None:
    """u_1 = east, u_2 = north: client d agrees eastward and opposes northward."""
    agreed = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    odd = torch.tensor([[4.0, 0.0], [0.0, -2.0]])
    updates = [Update(name, {"w": odd if name == "d" else agreed}, 1) for name in "abcd"]
    off = PLAIN | {"reliability": "direction", "warmup": 0}
    step = FedCmp(**off).aggregate({"w": torch.zeros(2, 2)}, updates, {}).state["w"]
    north = (3 * 2.0 - 0.02 * 2.0) / 3.02
    torch.testing.assert_close(step, torch.tensor([[4.0, 0.0], [0.0, north]]), rtol=1e-5, atol=1e-6)


def stretched(updates: list[Update], state: State, client: str, factor: float) -> list[Update]:
    return [
        replace(u, state={n: old + factor * (u.state[n] - old) for n, old in state.items()})
        if u.client == client
        else u
        for u in updates
    ]


def test_updates_of_the_usual_length_are_not_touched() -> None:
    """They leave the bytes as they are; one beyond the limit gets its usual length."""
    state, updates = tall(0), of_round(0)
    norms = {update.client: norm(state, update.state) for update in updates}
    expected = usual_norms(norms, {update.client: update.samples for update in updates})
    ratios = {client: norms[client] / expected[client] for client in norms}
    longest = max(ratios, key=ratios.__getitem__)
    free = FedCmp(clip=0.0).aggregate(state, updates, {})
    wide = FedCmp(clip=1.01 * ratios[longest]).aggregate(state, updates, {})
    assert all(torch.equal(free.state[name], wide.state[name]) for name in TALL)
    assert set(wide.figures["clip"].values()) == {1.0}
    assert "clip" not in free.figures
    near = FedCmp(clip=0.99 * ratios[longest]).aggregate(state, updates, {}).figures["clip"]
    assert near == pytest.approx(dict.fromkeys(near, 1.0) | {longest: 1 / ratios[longest]})


def test_the_usual_length_by_hand() -> None:
    """Ten times the data makes √10 times the length; less data never makes equal updates too long."""
    norms = {"a": 1.0, "b": 1.0, "c": 2.0, "d": 9.0}
    assert usual_norms(norms, {"a": 1, "b": 1, "c": 4, "d": 9}) == {"a": 1.5, "b": 1.5, "c": 2.0, "d": 3.0}
    assert factors(norms, {"a": 1.5, "b": 1.5, "c": 2.0, "d": 3.0}, 2.5)["d"] == pytest.approx(1 / 3)
    same = dict.fromkeys("abcde", 7.0)
    samples = dict(zip("abcde", (1, 10, 100, 1000, 10000), strict=True))
    assert set(factors(same, usual_norms(same, samples), 1.0).values()) == {1.0}
    walk = {client: n**0.5 for client, n in samples.items()}
    assert set(factors(walk, usual_norms(walk, samples), 1 + 1e-9).values()) == {1.0}


def test_a_long_update_counts_as_one_of_the_usual_length() -> None:
    ends = []
    for factor in (20.0, 1e6):
        result = Aggregate(tall(0), {})
        for round_ in range(3):
            updates = stretched(of_round(round_), result.state, "c1", factor)
            result = FedCmp().aggregate(result.state, updates, result.memory)
        ends.append(result.state)
    assert_same(*ends, 1e-3)


def test_a_poisoned_round_by_hand() -> None:
    """Norms 1, 1, 1 and 9: the last becomes 1, disagrees with 2/3 of the rest, and gets the floor."""
    agreed, opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([[-9.0, 0.0]])
    updates = [Update(name, {"w": opposite if name == "d" else agreed}, 1) for name in "abcd"]
    strategy = FedCmp(**PLAIN | {"reliability": "client", "warmup": 0, "clip": 2.0})
    result = strategy.aggregate({"w": torch.zeros(1, 2)}, updates, {})
    assert result.figures["clip"] == pytest.approx({"a": 1, "b": 1, "c": 1, "d": 1 / 9})
    assert result.figures["reliability"] == pytest.approx({"a": 1, "b": 1, "c": 1, "d": 0.02})
    assert result.state["w"].tolist() == [pytest.approx([(3 - 0.02) / 3.02, 0.0])]
    # Unclipped, it is the consensus: everybody else disagrees, and nobody loses weight.
    off = FedCmp(**PLAIN | {"reliability": "client", "warmup": 0}).aggregate(
        {"w": torch.zeros(1, 2)}, updates, {}
    )
    assert off.state["w"].tolist() == [pytest.approx([-1.5, 0.0])]


@pytest.mark.parametrize("attack", [-5.0, -1000.0])
@pytest.mark.parametrize("reliability", ["client", "direction"])
def test_a_quarter_of_long_updates_does_not_lead(attack: float, reliability: str) -> None:
    """Two of eight send many times the opposite of their update; the step stays near the honest one."""
    bad = ("c2", "c6")
    honest = FedCmp(reliability=reliability).aggregate(tall(0), of_round(0, 8), {})
    updates = of_round(0, 8)
    for client in bad:
        updates = stretched(updates, tall(0), client, attack)
    for clip, near in ((2.0, True), (0.0, False)):
        result = FedCmp(reliability=reliability, clip=clip).aggregate(tall(0), updates, {})
        name = "linear_2.weight"
        wanted, got = honest.state[name] - tall(0)[name], result.state[name] - tall(0)[name]
        cosine = float((wanted * got).sum() / (wanted.norm() * got.norm()))
        assert (cosine > 0.5) is near, cosine
