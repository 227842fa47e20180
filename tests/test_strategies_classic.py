"""The strategies of the literature against examples by hand and their papers' theorems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from fedcmp.federate.arithmetic.updates import Memory, Objective, State, Update
from fedcmp.federate.strategies.base import STRATEGIES, Strategy
from fedcmp.federate.strategies.dare import Dare
from fedcmp.federate.strategies.fedadagrad import FedAdagrad
from fedcmp.federate.strategies.fedadam import FedAdam
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.federate.strategies.fedavgm import FedAvgM
from fedcmp.federate.strategies.feddyn import FedDyn
from fedcmp.federate.strategies.fednova import FedNova
from fedcmp.federate.strategies.fedopt import FedOpt
from fedcmp.federate.strategies.fedprox import FedProx
from fedcmp.federate.strategies.fedyogi import FedYogi
from fedcmp.federate.strategies.knots import Knots, aligned
from fedcmp.federate.strategies.krum import Krum, MultiKrum, scores
from fedcmp.federate.strategies.median import Median
from fedcmp.federate.strategies.muon import Muon, orthogonalised
from fedcmp.federate.strategies.norm_clipping import NormClipping
from fedcmp.federate.strategies.scaffold import Scaffold, recall_shares
from fedcmp.federate.strategies.task_arithmetic import TaskArithmetic
from fedcmp.federate.strategies.ties import Ties, elect_and_merge, trim
from fedcmp.federate.strategies.trimmed_mean import TrimmedMean
from fedcmp.pipeline.options import Component

SHAPES = {"linear.weight": (6, 4), "linear.bias": (6,)}
CLASSIC = (
    "dare fedadagrad fedadam fedavgm feddyn fednova fedprox fedyogi knots krum median multi_krum muon "
    "norm_clipping scaffold task_arithmetic ties trimmed_mean"
).split()


def draw(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def clients(number: int, seed: int = 0) -> list[Update]:
    return [
        Update(f"c{k}", draw(100 * seed + k + 1), 2 * k + 1, 3, draw(100 * seed + k + 51))
        for k in range(number)
    ]


def vectors(*values: Sequence[float], samples: Sequence[int] | None = None) -> list[Update]:
    """Clients a, b, c, ... with one parameter w each."""
    counts = samples or [1] * len(values)
    return [
        Update(name, {"w": torch.tensor(each)}, n)
        for name, each, n in zip("abcdefgh", values, counts, strict=False)
    ]


def fused(strategy: Strategy, updates: Sequence[Update], state: State | None = None) -> State:
    state = state or {name: torch.zeros_like(each) for name, each in updates[0].state.items()}
    memory = strategy.begin(state, {update.client: update.samples for update in updates})
    return strategy.aggregate(state, updates, memory).state


def assert_same(a: State, b: State, tolerance: float = 1e-6) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


class Quadratic:
    """Clients of loss a / 2 · ‖w - b‖², coordinate by coordinate, that run plain gradient descent."""

    samples: Mapping[str, int] = {"a": 30, "b": 10, "c": 20}
    curvature: Mapping[str, Tensor] = {
        "a": torch.tensor([4.0, 0.5], dtype=torch.float64),
        "b": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "c": torch.tensor([0.3, 1.0], dtype=torch.float64),
    }
    centre: Mapping[str, Tensor] = {
        "a": torch.tensor([1.0, -2.0], dtype=torch.float64),
        "b": torch.tensor([-3.0, 4.0], dtype=torch.float64),
        "c": torch.tensor([5.0, 1.0], dtype=torch.float64),
    }
    rate = 0.1

    def gradient(self, client: str, w: Tensor) -> Tensor:
        return self.curvature[client] * (w - self.centre[client])

    def optimum(self) -> Tensor:
        weight = {client: n * self.curvature[client] for client, n in self.samples.items()}
        total = sum(weight[client] * self.centre[client] for client in self.samples)
        return total / sum(weight.values())  # type: ignore[arg-type,return-value]

    def train(self, client: str, state: State, objective: Objective, steps: int) -> Update:
        w, path = state["w"].clone(), []
        for _ in range(steps):
            path.append(self.gradient(client, w))
            pull = objective.proximal * (w - state["w"])
            linear = objective.linear["w"] if objective.linear else 0.0
            w = w - self.rate * (path[-1] + linear + pull)
        mean = {"w": torch.stack(path).mean(0)}
        return Update(client, {"w": w}, self.samples[client], steps, mean)

    def run(
        self,
        strategy: Strategy,
        rounds: int,
        steps: Callable[[str], int] = lambda client: 30,
        chosen: Callable[[int], Sequence[str]] = lambda round_: "abc",
    ) -> tuple[Tensor, Memory]:
        state: State = {"w": torch.zeros(2, dtype=torch.float64)}
        memory = strategy.begin(state, self.samples)
        for round_ in range(rounds):
            updates = [
                self.train(client, state, strategy.objective(client, memory), steps(client))
                for client in chosen(round_)
            ]
            result = strategy.aggregate(state, updates, memory)
            state, memory = result.state, result.memory
        return state["w"], memory


@pytest.mark.parametrize("name", CLASSIC)
class TestAll:
    def make(self, name: str) -> Strategy:
        return STRATEGIES.build(Component(name=name), "federate.strategy")

    def test_it_is_registered_and_explains_every_option(self, name: str) -> None:
        strategy = self.make(name)
        documented = "".join(cls.__doc__ or "" for cls in type(strategy).__mro__)
        for option in type(strategy).model_fields:
            assert f"    {option}: " in documented

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_few_clients_are_enough(self, name: str, number: int) -> None:
        for update in (clients(number), clients(number)[::-1]):
            assert all(bool(each.isfinite().all()) for each in fused(self.make(name), update).values())

    def test_the_order_of_clients_does_not_matter_and_updates_stay(self, name: str) -> None:
        strategy, results = self.make(name), []
        for turn in (1, -1):
            state, samples = draw(0), {f"c{k}": 2 * k + 1 for k in range(5)}
            memory = strategy.begin(state, samples)
            for round_ in range(3):
                updates = clients(5, round_)[::turn]
                result = strategy.aggregate(state, updates, memory)
                for update, copy in zip(updates, clients(5, round_)[::turn], strict=True):
                    assert all(torch.equal(update.state[n], copy.state[n]) for n in SHAPES)
                    assert all(torch.equal(update.gradient[n], copy.gradient[n]) for n in SHAPES)  # type: ignore[index]
                state, memory = result.state, result.memory
            results.append(result)
        first, second = results
        assert all(torch.equal(first.state[n], second.state[n]) for n in SHAPES)
        assert first.memory.keys() == second.memory.keys()
        assert all(torch.equal(first.memory[key], second.memory[key]) for key in first.memory)
        assert first.figures == second.figures
        assert list(first.state) == list(SHAPES)

    def test_clients_that_did_not_move_leave_the_projector(self, name: str) -> None:
        zero = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
        still = [Update(f"c{k}", draw(0), k + 1, 2, zero) for k in range(4)]
        assert_same(fused(self.make(name), still, draw(0)), draw(0))
        weightless = [Update("c", {"w": torch.zeros(3, 2)}, 1, 1, {"w": torch.zeros(3, 2)})]
        assert_same(fused(self.make(name), weightless), weightless[0].state)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "strategy",
    [
        FedAvg(),
        FedProx(),
        FedNova(),
        FedAvgM(),
        Scaffold(),
        Median(),
        TrimmedMean(trim=0.3),
        Krum(),
        MultiKrum(),
        NormClipping(),
        Knots(inner="mean"),
        Knots(inner="ties", density=1.0),
        Ties(density=1.0),
    ],
    ids=repr,
)
def test_identical_clients_give_that_client_back(strategy: Strategy, number: int) -> None:
    same = [Update(f"c{k}", draw(5), k + 1, 3, draw(6)) for k in range(number)]
    assert_same(fused(strategy, same, draw(0)), draw(5))


def test_fedprox_asks_clients_to_stay_near() -> None:
    assert FedProx().objective("a", {}) == Objective(0.01)
    assert FedProx(proximal=0.5).objective("a", {}) == Objective(0.5)
    assert_same(fused(FedProx(), clients(4)), fused(FedAvg(), clients(4)))
    drift = [Quadratic().run(FedProx(proximal=mu), 1)[0] for mu in (0.0, 1.0, 8.0)]
    assert drift[0].norm() > drift[1].norm() > drift[2].norm() > 0


def test_fedavgm_by_hand() -> None:
    strategy = FedAvgM(momentum=0.5, server_learning_rate=2.0)
    first = strategy.aggregate({"w": torch.zeros(1)}, vectors([4.0], [0.0], samples=[1, 3]), {})
    assert first.state["w"].tolist() == [2.0]
    assert first.figures == {"weight": {"a": 0.25, "b": 0.75}}
    second = strategy.aggregate(first.state, vectors([5.0]), first.memory)
    assert second.memory["momentum/w"].tolist() == [3.5]
    assert second.state["w"].tolist() == [9.0]
    assert_same(fused(FedAvgM(momentum=0), clients(4)), fused(FedAvg(), clients(4)))


@pytest.mark.parametrize(
    ("kind", "options", "v1", "v2"),
    [
        (FedAdam, {"beta2": 0.75}, 0.75 * 0.25 + 0.25 * 4, 0.75 * (0.75 * 0.25 + 0.25 * 4) + 0.25 * 1),
        (FedYogi, {"beta2": 0.75}, 0.25 + 0.25 * 4, 0.25 + 0.25 * 4 - 0.25 * 1),
        (FedAdagrad, {}, 0.25 + 4, 0.25 + 4 + 1),
    ],
)
def test_fedopt_two_rounds_by_hand(kind: type[FedOpt], options: dict, v1: float, v2: float) -> None:
    """τ = 0.5, β_1 = 0.8; mean updates of 2 and of -1."""
    strategy = kind(beta1=0.8, tau=0.5, server_learning_rate=0.1, **options)
    state = {"w": torch.tensor([1.0], dtype=torch.float64)}
    memory = strategy.begin(state, {})
    assert {key: float(each) for key, each in memory.items()} == {"m/w": 0.0, "v/w": 0.25}

    def updates(delta: float) -> list[Update]:
        return [Update("a", {"w": state["w"] + 3 * delta}, 1), Update("b", {"w": state["w"] + delta / 3}, 3)]

    first = strategy.aggregate(state, updates(2.0), memory)
    m1 = 0.2 * 2
    assert float(first.memory["v/w"]) == pytest.approx(v1)
    assert float(first.state["w"]) == pytest.approx(1 + 0.1 * m1 / (math.sqrt(v1) + 0.5))
    state = first.state
    second = strategy.aggregate(state, updates(-1.0), first.memory)
    m2 = 0.8 * m1 - 0.2
    assert float(second.memory["m/w"]) == pytest.approx(m2)
    assert float(second.memory["v/w"]) == pytest.approx(v2)
    expected = float(state["w"]) + 0.1 * m2 / (math.sqrt(v2) + 0.5)
    assert float(second.state["w"]) == pytest.approx(expected)


def test_fedyogi_forgets_slowly_and_the_base_is_not_a_strategy() -> None:
    v, square = torch.tensor([9.0, 1.0, 4.0]), torch.tensor([1.0, 9.0, 4.0])
    assert FedYogi(beta2=0.5).second_moment(v, square).tolist() == [8.5, 5.5, 4.0]
    assert "fedopt" not in STRATEGIES.names()
    assert "beta2" not in FedAdagrad.model_fields


def test_fednova_by_hand() -> None:
    """p = 1/4, 3/4 and τ = 8, 2: τ_eff = 3.5, and updates of 16 and 4 are 2 a step each."""
    updates = [Update("a", {"w": torch.tensor([16.0])}, 1, 8), Update("b", {"w": torch.tensor([4.0])}, 3, 2)]
    result = FedNova().aggregate({"w": torch.zeros(1)}, updates, {})
    assert result.state["w"].tolist() == [7.0]
    assert result.figures["weight"] == pytest.approx({"a": 1 / 13, "b": 12 / 13})
    assert fused(FedNova(server_learning_rate=0.5), updates)["w"].tolist() == [3.5]
    assert_same(fused(FedNova(), clients(4), draw(0)), fused(FedAvg(), clients(4), draw(0)))


def test_fednova_undoes_the_pull_of_clients_that_take_more_steps() -> None:
    """With steps so small that the drift vanishes, what is left of FedAvg's error is the pull."""
    quadratic = Quadratic()
    quadratic.rate = 5e-3

    def steps(client: str) -> int:
        return {"a": 2, "b": 40, "c": 5}[client]

    errors = [
        float((quadratic.run(kind(), 300, steps)[0] - quadratic.optimum()).norm())
        for kind in (FedAvg, FedNova)
    ]
    assert errors[0] > 1
    assert errors[1] < 0.2


def test_scaffold_finds_the_optimum_where_fedavg_does_not() -> None:
    quadratic = Quadratic()
    best = quadratic.optimum()
    found, memory = quadratic.run(Scaffold(), 200)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-9)
    for client in "abc":
        torch.testing.assert_close(memory[f"control/{client}/w"], quadratic.gradient(client, best))
    assert float((quadratic.run(FedAvg(), 200)[0] - best).norm()) > 0.5
    pulled, _ = quadratic.run(Scaffold(proximal=0.5), 400)
    torch.testing.assert_close(pulled, best, rtol=0, atol=1e-9)


def test_scaffold_with_some_clients_absent() -> None:
    quadratic, strategy = Quadratic(), Scaffold(server_learning_rate=0.5)
    turns = ("ab", "bc", "ca")
    found, memory = quadratic.run(strategy, 500, chosen=lambda round_: turns[round_ % 3])
    torch.testing.assert_close(found, quadratic.optimum(), rtol=0, atol=1e-6)
    state = {"w": found}
    update = quadratic.train("a", state, strategy.objective("a", memory), 3)
    kept = strategy.aggregate(state, [update], memory).memory
    assert torch.equal(kept["control/b/w"], memory["control/b/w"])
    assert torch.equal(kept["control/a/w"], update.gradient["w"])  # type: ignore[index]


def test_scaffold_is_the_papers_option_two_for_plain_sgd() -> None:
    quadratic, strategy, state = Quadratic(), Scaffold(), {"w": torch.tensor([3.0, -1.0]).double()}
    memory = strategy.begin(state, quadratic.samples)
    memory |= {
        f"control/{client}/w": torch.tensor(c).double()
        for client, c in {"a": [1.0, 2.0], "b": [-4.0, 0.0], "c": [0.5, 7.0]}.items()
    }
    assert recall_shares(memory) == pytest.approx({"a": 1 / 2, "b": 1 / 6, "c": 1 / 3})
    mean = torch.tensor([0.5 - 4 / 6 + 0.5 / 3, 1 + 7 / 3]).double()
    objective = strategy.objective("b", memory)
    assert objective.proximal == 0
    torch.testing.assert_close(objective.linear["w"], mean - memory["control/b/w"])  # type: ignore[index]
    update = quadratic.train("b", state, objective, 7)
    kept = strategy.aggregate(state, [update], memory).memory
    expected = memory["control/b/w"] - mean + (state["w"] - update.state["w"]) / (7 * quadratic.rate)
    torch.testing.assert_close(kept["control/b/w"], expected)


def test_scaffold_needs_gradients() -> None:
    assert Scaffold.wants == {"gradient"}
    with pytest.raises(ValueError, match="client 'a' sent no gradient"):
        fused(Scaffold(), vectors([1.0]))


@pytest.mark.parametrize("options", [{"alpha": 0.3}, {"alpha": 1.0}, {"alpha": 0.5, "proximal": 0.3}])
def test_feddyn_finds_the_optimum_where_fedavg_does_not(options: dict) -> None:
    quadratic = Quadratic()
    best = quadratic.optimum()
    found, memory = quadratic.run(FedDyn(**options), 150, lambda client: 60)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-8)
    for client in "abc":
        expected = quadratic.gradient(client, best)
        torch.testing.assert_close(memory[f"h/{client}/w"], expected, rtol=0, atol=1e-6)
    assert float((quadratic.run(FedAvg(), 150, lambda client: 60)[0] - best).norm()) > 0.5


def test_feddyn_with_some_clients_absent() -> None:
    turns = ("ab", "bc", "ca")
    found, _ = Quadratic().run(FedDyn(alpha=1.0), 500, lambda client: 60, lambda round_: turns[round_ % 3])
    torch.testing.assert_close(found, Quadratic().optimum(), rtol=0, atol=1e-6)


def test_feddyn_stays_at_the_optimum() -> None:
    quadratic, strategy = Quadratic(), FedDyn(alpha=0.2)
    state = {"w": quadratic.optimum()}
    memory = strategy.begin(state, quadratic.samples)
    memory |= {f"h/{client}/w": quadratic.gradient(client, state["w"]) for client in "abc"}
    updates = [quadratic.train(c, state, strategy.objective(c, memory), 25) for c in "abc"]
    torch.testing.assert_close(strategy.aggregate(state, updates, memory).state["w"], state["w"])


def test_feddyn_by_hand() -> None:
    """a = 0.5, p = 1/4, 3/4: h_a = -2, h_b = -1, h = -1.25, W = 2.5 + 2.5; then b alone."""
    strategy, state = FedDyn(alpha=0.5, proximal=0.25), {"w": torch.zeros(1)}
    memory = strategy.begin(state, {"a": 10, "b": 30})
    assert strategy.objective("a", memory) == Objective(0.75, {"w": torch.zeros(1)})
    first = strategy.aggregate(state, vectors([4.0], [2.0], samples=[1, 1]), memory)
    assert first.state["w"].tolist() == [5.0]
    assert first.figures["weight"] == {"a": 0.25, "b": 0.75}
    assert strategy.objective("a", first.memory).linear == {"w": torch.tensor([2.0])}
    second = strategy.aggregate(first.state, [Update("b", {"w": torch.tensor([7.0])}, 1)], first.memory)
    assert second.memory["h/a/w"].tolist() == [-2.0]
    assert second.memory["h/b/w"].tolist() == [-2.0]
    assert second.state["w"].tolist() == [7.0 + 2.0 / 0.5]


def test_median_by_hand() -> None:
    odd = vectors([1.0, 9.0], [3.0, -5.0], [2.0, 0.0], samples=[100, 1, 1])
    assert fused(Median(), odd)["w"].tolist() == [2.0, 0.0]
    even = vectors([1.0], [10.0], [4.0], [2.0])
    assert fused(Median(), even)["w"].tolist() == [3.0]
    assert fused(Median(), vectors([1.0], [4.0]))["w"].tolist() == [2.5]


def test_trimmed_mean_by_hand() -> None:
    five = vectors([1.0], [2.0], [6.0], [-50.0], [1000.0])
    assert fused(TrimmedMean(trim=0.2), five)["w"].tolist() == [3.0]
    assert fused(TrimmedMean(trim=0.4), five)["w"].tolist() == [2.0]
    assert fused(TrimmedMean(trim=0.19), five)["w"].tolist() == pytest.approx([959 / 5])
    assert fused(TrimmedMean(trim=0.25), vectors([0.0], [1.0], [5.0], [9.0]))["w"].tolist() == [3.0]


@pytest.mark.parametrize("size", [10.0, 1e6, 1e30])
@pytest.mark.parametrize("strategy", [Median(), TrimmedMean(), Krum(), MultiKrum()], ids=repr)
def test_one_outlier_of_any_size_is_rejected(strategy: Strategy, size: float) -> None:
    honest = [Update(f"c{k}", {n: t * 0.1 + 1 for n, t in draw(k).items()}, 5) for k in range(5)]
    liar = Update("a", {name: torch.full(shape, -size) for name, shape in SHAPES.items()}, 10**6)
    for name, result in fused(strategy, [liar, *honest]).items():
        sent = torch.stack([update.state[name] for update in honest])
        assert bool((result >= sent.amin(0)).all())
        assert bool((result <= sent.amax(0)).all())


def test_krum_by_hand() -> None:
    """Distances on a line; of six with f = 1 every client looks at its three nearest others."""
    line = vectors([0.0], [1.0], [3.0], [4.0], [6.0], [100.0], samples=[1, 3, 5, 2, 2, 9])
    sums = scores(line, 3)
    assert [sums[name] for name in "abcde"] == [1 + 9 + 16, 1 + 4 + 9, 1 + 4 + 9, 1 + 4 + 9, 4 + 9 + 25]
    krum = Krum().aggregate({"w": torch.zeros(1)}, line[::-1], {})
    assert krum.state["w"].tolist() == [1.0]
    assert krum.figures["weight"] == {"a": 0, "b": 1, "c": 0, "d": 0, "e": 0, "f": 0}
    two = Krum(keep=2).aggregate({"w": torch.zeros(1)}, line, {})
    assert two.state["w"].tolist() == [(3 * 1 + 5 * 3) / 8]
    assert two.figures["weight"]["c"] == 5 / 8
    multi = MultiKrum().aggregate({"w": torch.zeros(1)}, line, {})
    assert multi.figures["weight"]["f"] == 0
    assert multi.state["w"].tolist() == pytest.approx([(3 + 15 + 8 + 12) / 13])


def test_krum_counts_all_parameters_and_lowers_f_for_few_clients() -> None:
    sent = [((0.0, 0.0), "a"), ((1.0, 0.0), "b"), ((1.0, 5.0), "c")]
    updates = [Update(n, {"v": torch.tensor([x]), "w": torch.tensor([y])}, 1) for (x, y), n in sent]
    assert scores(updates, 2) == {"a": 1 + 26, "b": 1 + 25, "c": 25 + 26}
    assert Krum(byzantine=5).aggregate(updates[0].state, updates, {}).figures["weight"]["a"] == 1
    averaged = MultiKrum(byzantine=5).aggregate(updates[0].state, updates, {})
    assert averaged.figures["weight"] == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})


def test_norm_clipping_by_hand() -> None:
    """Norms 5, 10 and 50: the median is 10, taken over both parameters together."""
    sent = {"a": (3.0, 4.0), "b": (6.0, 8.0), "c": (-30.0, 40.0)}
    updates = [
        Update(name, {"v": torch.tensor([x]), "w": torch.tensor([y])}, n)
        for (name, (x, y)), n in zip(sent.items(), (1, 1, 2), strict=True)
    ]
    state = {"v": torch.zeros(1), "w": torch.zeros(1)}
    result = NormClipping().aggregate(state, updates, {})
    assert result.figures["clip"] == pytest.approx({"a": 1, "b": 1, "c": 0.2})
    assert result.figures["weight"] == {"a": 0.25, "b": 0.25, "c": 0.5}
    assert float(result.state["v"]) == pytest.approx((3 + 6 - 2 * 6) / 4)
    assert float(result.state["w"]) == pytest.approx((4 + 8 + 2 * 8) / 4)
    tight = NormClipping(clip=0.25, server_learning_rate=2.0).aggregate(state, updates, {})
    assert tight.figures["clip"] == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.05})
    assert float(tight.state["v"]) == pytest.approx(2 * (1.5 + 1.5 - 2 * 1.5) / 4)
    assert_same(fused(NormClipping(clip=99), clients(4)), fused(FedAvg(), clients(4)))


def test_norm_clipping_where_most_clients_did_not_move() -> None:
    result = NormClipping().aggregate({"w": torch.zeros(1)}, vectors([0.0], [0.0], [9.0]), {})
    assert result.figures["clip"] == {"a": 1, "b": 1, "c": 0}
    assert result.state["w"].tolist() == [0.0]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_moves_all_directions_alike(shape: tuple[int, int]) -> None:
    m = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = orthogonalised(m)
    values = torch.linalg.svdvals(step)
    torch.testing.assert_close(values, torch.full_like(values, m.norm() / len(values) ** 0.5))  # type: ignore[arg-type]
    torch.testing.assert_close(step.norm(), m.norm())
    symmetric = step.T @ m
    torch.testing.assert_close(symmetric, symmetric.T)
    assert bool((torch.linalg.eigvalsh(symmetric) > -1e-9).all())
    turned, _ = torch.linalg.qr(m @ m.T)
    torch.testing.assert_close(orthogonalised(turned), turned)


def test_muon_invents_no_directions() -> None:
    flat = torch.outer(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 0.0])).double()
    torch.testing.assert_close(orthogonalised(flat), flat)
    assert orthogonalised(torch.zeros(3, 2)).tolist() == torch.zeros(3, 2).tolist()


def test_muon_two_rounds_by_hand() -> None:
    strategy = Muon(momentum=0.5, server_learning_rate=2.0)
    state = {"w": torch.zeros(2, 2), "b": torch.zeros(1)}
    first = strategy.aggregate(
        state, [Update("a", {"w": torch.diag(torch.tensor([3.0, 4.0])), "b": torch.tensor([1.0])}, 1)], {}
    )
    length = 5 / math.sqrt(2)
    torch.testing.assert_close(first.state["w"], 2 * length * torch.eye(2))
    assert first.state["b"].tolist() == [2.0]
    moved = {"w": first.state["w"] + torch.diag(torch.tensor([1.5, -4.0])), "b": first.state["b"]}
    second = strategy.aggregate(first.state, [Update("a", moved, 1)], first.memory)
    assert second.memory["momentum/b"].tolist() == [0.5]
    step = (second.state["w"] - first.state["w"]).double()
    length = math.sqrt((3**2 + 2**2) / 2)
    expected = 2 * length * torch.diag(torch.tensor([1.0, -1.0])).double()
    torch.testing.assert_close(step, expected, rtol=1e-5, atol=1e-5)


def test_task_arithmetic_by_hand() -> None:
    updates = vectors([1.0, 5.0], [3.0, 1.0], samples=[1, 99])
    state = {"w": torch.tensor([1.0, 1.0])}
    assert fused(TaskArithmetic(scale=0.5), updates, state)["w"].tolist() == [2.0, 3.0]


def test_ties_by_hand() -> None:
    """Of five coordinates over two parameters, each client keeps its three largest."""
    sent = {
        "a": ([5.0, -3.0], [1.0, 0.5, 4.0]),
        "b": ([1.0, -1.0], [-6.0, 0.0, 2.0]),
        "c": ([-9.0, 2.0], [3.0, 0.1, 0.2]),
    }
    updates = [
        Update(name, {"v": torch.tensor(v), "w": torch.tensor(w)}, 1 + 8 * (name == "a"))
        for name, (v, w) in sent.items()
    ]
    result = fused(Ties(density=0.6), updates)
    # Kept: a 5 -3 . . 4; b 1 -1 -6 . 2, where two are tied for the third place; c -9 2 3 . .
    assert result["v"].tolist() == [-9.0, -2.0]
    assert result["w"].tolist() == [-6.0, 0.0, 3.0]
    assert fused(Ties(density=0.6, scale=0.5), updates)["w"].tolist() == [-3.0, 0.0, 1.5]


def test_ties_in_parts() -> None:
    flat = torch.tensor([0.1, -5.0, 3.0, 0.0, -2.0])
    assert trim(flat, 0.4).tolist() == pytest.approx([0, -5, 3, 0, 0])
    assert trim(flat, 0.01).tolist() == [0, -5, 0, 0, 0]
    assert torch.equal(trim(flat, 1.0), flat)
    assert trim(torch.zeros(4), 0.5).tolist() == [0, 0, 0, 0]
    cancelling = [torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 0.0]), torch.tensor([0.0, 3.0])]
    assert elect_and_merge(cancelling).tolist() == [0.0, 2.0]


def test_knots_of_means_is_fedavg() -> None:
    assert_same(fused(Knots(inner="mean"), clients(4), draw(0)), fused(FedAvg(), clients(4), draw(0)))
    half = fused(Knots(inner="mean", scale=0.5), clients(4), draw(0))
    assert_same(half, fused(FedAvg(server_learning_rate=0.5), clients(4), draw(0)))


def test_knots_aligns_what_ties_sees() -> None:
    """Where the shared basis is the axes, KnOTS is TIES; turned, it gives the turned result."""
    deltas = {
        "a": torch.tensor([[8.0, 6.0], [6.0, -8.0]]),
        "b": torch.tensor([[-6.0, 8.0], [4.0, 3.0]]),
        "c": torch.tensor([[0.0, 0.0], [-5.0, 1.0]]),
    }
    turn, _ = torch.linalg.qr(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))

    def of(q: Tensor) -> list[Update]:
        return [Update(name, {"w": q @ delta}, 1) for name, delta in deltas.items()]

    plain = fused(Ties(density=0.5), of(torch.eye(2)))["w"]
    assert plain.tolist() == [[8.0, 8.0], [-5.0, -8.0]]
    knots = Knots(density=0.5)
    torch.testing.assert_close(fused(knots, of(torch.eye(2)))["w"], plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused(knots, of(turn))["w"], turn @ plain, rtol=1e-5, atol=1e-5)
    assert float((fused(Ties(density=0.5), of(turn))["w"] - turn @ plain).norm()) > 0.5


def test_knots_blocks_rebuild_the_updates() -> None:
    deltas = {update.client: update.state["linear.weight"].double() for update in clients(3)}
    basis, blocks = aligned(deltas)
    torch.testing.assert_close(basis.T @ basis, torch.eye(6, dtype=torch.float64))
    for client, delta in deltas.items():
        torch.testing.assert_close(basis @ blocks[client], delta)
    flat = torch.outer(torch.arange(1.0, 7.0), torch.ones(4)).double()
    basis, blocks = aligned({"a": flat, "b": 2 * flat})
    assert basis.shape == (6, 1)
    assert blocks["b"].shape == (1, 4)


def test_dare_drops_and_rescales() -> None:
    one = [Update("a", {"w": torch.ones(100, 100)}, 1)]
    strategy = Dare(drop=0.75)
    values = fused(strategy, one)["w"]
    assert set(values.unique().tolist()) == {0.0, 4.0}
    assert float((values == 0).float().mean()) == pytest.approx(0.75, abs=0.02)
    assert_same(fused(Dare(drop=0.0), clients(4)), fused(FedAvg(), clients(4)))


def test_dare_is_fedavg_in_expectation() -> None:
    updates, state = clients(3), draw(0)
    total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    memory: Memory = {}
    for _ in range(2000):
        result = Dare().aggregate(state, updates, memory)
        memory = result.memory
        total = {name: total[name] + result.state[name] / 2000 for name in SHAPES}
    expected = fused(FedAvg(), updates, state)
    for name in SHAPES:
        torch.testing.assert_close(total[name], expected[name].double(), rtol=0, atol=0.12)


def test_dare_depends_on_seed_client_and_round_alone() -> None:
    state = {"w": torch.zeros(64)}

    def mask(client: str, memory: Memory, seed: int = 0) -> tuple[bool, ...]:
        update = Update(client, {"w": torch.ones(64)}, 1)
        return tuple((Dare(seed=seed).aggregate(state, [update], memory).state["w"] > 0).tolist())

    later: Memory = {"rounds": torch.tensor(1)}
    torch.manual_seed(1)
    seen = [mask("a", {}), mask("b", {}), mask("a", later), mask("a", {}, seed=1)]
    assert len(set(seen)) == 4
    before = torch.get_rng_state()
    assert seen == [mask("a", {}), mask("b", {}), mask("a", later), mask("a", {}, seed=1)]
    assert torch.equal(before, torch.get_rng_state())
    both = [Update("a", {"w": torch.ones(64)}, 1), Update("b", {"w": torch.zeros(64)}, 1)]
    assert tuple((Dare().aggregate(state, both, {}).state["w"] > 0).tolist()) == seen[0]
