"""Pilot: its connector, its averages, and its rounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcmp.federate.arithmetic.neighbours import distances, mixed, shares_of_neighbours
from fedcmp.federate.arithmetic.updates import State, Update, data_weights, weighted_sum
from fedcmp.federate.strategies.pilot import Pilot
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.projectors.mlp import MlpProjector
from fedcmp.pipeline.models.projectors.pilot import PilotProjector, balance, difference

TASKS = ("caption", "yesno", "short")
OF = {f"{task}{number}": task for task in TASKS for number in (1, 2, 3)}


def connector(seed: int = 0, tasks: tuple[str, ...] = TASKS) -> PilotProjector:
    made = PilotProjector(6, 8, tasks)
    projectors.initialise(made, torch.Generator().manual_seed(seed))
    return made


def features(pictures: int = 4) -> torch.Tensor:
    return torch.randn(pictures, 5, 6, generator=torch.Generator().manual_seed(9))


def pretrained() -> MlpProjector:
    made = MlpProjector(6, 8, 2)
    projectors.initialise(made, torch.Generator().manual_seed(5))
    return made


@pytest.mark.parametrize("only", [None, *TASKS])
def test_before_training_the_tokens_are_those_of_the_pretrained(only: str | None) -> None:
    made, before = connector(), pretrained()
    made.begin(before.state_dict())
    made.leave_only(only)
    torch.testing.assert_close(made(features()), before(features()), rtol=0, atol=1e-6)


def test_the_first_stage_heeds_its_own_task_alone() -> None:
    one, other = connector(), connector(1)
    other.load_state_dict(
        other.state_dict()
        | {name: value for name, value in one.state_dict().items() if "yesno" in name or "client" in name}
        | {"router.weight": one.router.weight.detach()}
    )
    for made in (one, other):
        made.leave_only("yesno")
    assert torch.equal(one(features()), other(features()))
    expected = one.client(features()) + one.task["yesno"](features()) + one.cross["yesno"](features())
    torch.testing.assert_close(one(features()), expected, rtol=0, atol=1e-6)


def test_tokens_are_the_equation() -> None:
    made = connector()
    h = features()
    shares = torch.softmax(h @ made.router.weight.T + made.mask, -1)
    expected = made.client(h) + sum(
        shares[..., i, None] * (made.task[task](h) + made.cross[task](h)) for i, task in enumerate(TASKS)
    )
    torch.testing.assert_close(made(h), expected, rtol=0, atol=1e-6)


def test_a_single_task_makes_the_router_void() -> None:
    made = connector(tasks=("all",))
    before = made(features())
    made.router.weight.data.normal_()
    torch.testing.assert_close(made(features()), before, rtol=0, atol=1e-6)


def test_the_losses_are_their_equations() -> None:
    own, client = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    a, b = (tokens.flatten(1) / tokens.flatten(1).norm(dim=1, keepdim=True) for tokens in (own, client))
    naive = (a.T @ b).square().sum() / 9
    torch.testing.assert_close(difference(own, client), naive, rtol=1e-5, atol=1e-7)
    shares = torch.tensor([[[0.7, 0.3], [0.6, 0.4]], [[0.1, 0.9], [0.8, 0.2]]])
    # Three of four tokens choose the first; mean shares are .55 and .45.
    assert float(balance(shares)) == pytest.approx(2 * (0.75 * 0.55 + 0.25 * 0.45))
    made = connector()
    _, losses = made.parts(features())
    z = (features() @ made.router.weight.T).logsumexp(-1).square().mean()
    torch.testing.assert_close(losses["router_z"], z)


def states(seed: int = 0, text: bool = True) -> dict[str, State]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for client in OF:
        state = {f"task.{task}.linear_1.weight": torch.randn(4, 3, generator=generator) for task in TASKS}
        if text:
            state["lora.q.lora_A.weight"] = torch.randn(2, 5, generator=generator)
            state["lora.q.lora_B.weight"] = torch.randn(6, 2, generator=generator)
        made[client] = state
    return made


def start() -> State:
    return {name: torch.zeros_like(value) for name, value in next(iter(states().values())).items()}


def updates(of: dict[str, State], samples: dict[str, int] | None = None) -> list[Update]:
    counts = samples or {client: 10 + number for number, client in enumerate(of)}
    return [Update(client, state, counts[client]) for client, state in of.items()]


def text_of(state: State) -> State:
    return {name: value for name, value in state.items() if name.startswith("lora.")}


def test_what_sees_is_averaged_within_its_task() -> None:
    sent = updates(states())
    made = Pilot(tasks=OF).aggregate(start(), sent, {})
    for task in TASKS:
        name = f"task.{task}.linear_1.weight"
        own = [update for update in sent if OF[update.client] == task]
        mean = weighted_sum({update.client: update.state[name] for update in own}, data_weights(own))
        torch.testing.assert_close(made.state[name], mean.float(), rtol=0, atol=1e-6)
    absent = [update for update in sent if OF[update.client] != "short"]
    kept = Pilot(tasks=OF).aggregate(start(), absent, {}).state["task.short.linear_1.weight"]
    assert not kept.any()


def test_what_speaks_is_averaged_with_the_nearest() -> None:
    sent = updates(states())
    made = Pilot(tasks=OF).aggregate(start(), sent, {})
    rows = torch.stack([torch.cat([v.flatten() for v in text_of(update.state).values()]) for update in sent])
    apart = torch.cdist(rows.double(), rows.double())
    for k, update in enumerate(sent):
        near = [j for j in apart[k].argsort().tolist() if j != k][:2]
        n = [each.samples for each in sent]
        alpha = sum(n[j] for j in near) / (n[k] + sum(n[j] for j in near))
        inverse = {j: 1 / float(apart[k, j]) for j in near}
        expected = (1 - alpha) * rows[k].double() + alpha * sum(
            inverse[j] / sum(inverse.values()) * rows[j].double() for j in near
        )
        found = torch.cat([v.flatten() for v in made.personal[update.client].values()])
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_the_order_of_clients_changes_nothing() -> None:
    sent = updates(states())
    one = Pilot(tasks=OF).aggregate(start(), sent, {})
    other = Pilot(tasks=OF).aggregate(start(), sent[::-1], {})
    assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)
    for client in OF:
        mine, theirs = one.personal[client], other.personal[client]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_equal_clients_stay_as_they_are() -> None:
    same = dict.fromkeys(OF, next(iter(states().values())))
    made = Pilot(tasks=OF).aggregate(start(), updates(same), {})
    for client, state in same.items():
        whole = made.state | made.personal[client]
        assert all(torch.allclose(whole[name], value, rtol=0, atol=1e-6) for name, value in state.items())


def test_one_client_without_neighbours_is_that_client() -> None:
    only = {"caption1": states()["caption1"]}
    made = Pilot(tasks={"caption1": "caption"}, neighbours=0).aggregate(start(), updates(only), {})
    whole = made.state | made.personal["caption1"]
    for name, value in only["caption1"].items():
        if "yesno" not in name and "short" not in name:
            torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-6)


def test_all_neighbours_at_one_distance_are_fedavg() -> None:
    simplex = torch.eye(9)
    of = {
        client: {"lora.q.lora_A.weight": row.reshape(3, 3)} for client, row in zip(OF, simplex, strict=True)
    }
    zero = {"lora.q.lora_A.weight": torch.zeros(3, 3)}
    sent = updates(of, dict.fromkeys(OF, 10))
    made = Pilot(tasks=OF, neighbours=8).aggregate(zero, sent, {})
    for client in OF:
        found = made.personal[client]["lora.q.lora_A.weight"]
        torch.testing.assert_close(found, torch.full((3, 3), 1 / 9), rtol=0, atol=1e-6)


@given(st.integers(2, 9), st.integers(0, 9), st.integers(0, 999))
def test_weights_sum_to_one_and_are_of_the_nearest(clients: int, neighbours: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 3, (clients, 2), generator=generator)  # often equal
    of = {f"c{k}": {"x": point.float()} for k, point in enumerate(points)}
    samples = torch.randint(1, 50, (clients,), generator=generator).double()
    apart = distances(of)
    weights = shares_of_neighbours(apart, samples, neighbours)
    torch.testing.assert_close(weights.sum(1), torch.ones(clients, dtype=torch.float64))
    assert bool((weights >= 0).all())
    assert int((weights > 0).sum(1).max()) <= neighbours + 1
    for client in range(clients):
        used = [j for j in range(clients) if j != client and weights[client, j] > 0]
        unused = [j for j in range(clients) if j != client and j not in used]
        zero = bool(used) and bool((apart[client, used] == 0).all())
        if used and unused and not zero:
            assert apart[client, used].max() <= apart[client, unused].min()
    assert mixed(of, weights).keys() == of.keys()


@pytest.mark.parametrize("stage", [0, 1])
def test_roles_freeze_what_is_not_the_clients_own(stage: int) -> None:
    role = Pilot(tasks=OF).role("yesno2", stage)
    trained = {
        name for name in [*connector().state_dict(), "lora.q.lora_A.weight"] if name.startswith(role.trains)
    }
    assert all("task." not in name or "task.yesno" in name for name in trained)
    assert any(name.startswith("lora.") for name in trained)
    if stage == 0:
        assert role.task == "yesno"
        assert not any(name.startswith(("cross.", "router.")) for name in trained)
        assert any(name.startswith("client.") for name in trained)
    else:
        assert role.task is None
        assert {name.split(".")[1] for name in trained if name.startswith("cross.")} == {"caption", "short"}
        assert not any(name.startswith("client.") for name in trained)


def test_too_many_neighbours_are_warned_of() -> None:
    assert Pilot(tasks=OF).warnings() == []
    (warning,) = Pilot(tasks=OF, neighbours=3).warnings()
    assert "federate.strategy.neighbours = 3" in warning
