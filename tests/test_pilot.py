"""Pilot: its connector, its averages, and its rounds."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import apart
from hypothesis import given
from hypothesis import strategies as st
from test_federate import _killed_after_saving
from test_sites import SILOS, FakeLink, over, sites_config  # noqa: F401

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.arithmetic.neighbours import distances, mixed, shares_of_neighbours
from fedcmp.federate.arithmetic.updates import State, Update, data_weights, weighted_sum
from fedcmp.federate.engines.service import Service
from fedcmp.federate.engines.wire import Payload, pack, unpack
from fedcmp.federate.run import run as federate
from fedcmp.federate.server import rounds as server
from fedcmp.federate.strategies.pilot import Pilot
from fedcmp.pipeline.config import Federate
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.models import projector as projectors
from fedcmp.pipeline.models.projectors.mlp import MlpProjector
from fedcmp.pipeline.models.projectors.pilot import PilotProjector, balance, difference
from fedcmp.pipeline.run_folder import Run

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


def test_every_silo_needs_a_task() -> None:
    options = Federate.model_validate(
        {"silos": [*OF, "another"], "projector": {"name": "pilot", "tasks": list(TASKS)}}
    )
    with pytest.raises(UserError, match="another have no task"):
        Pilot(tasks=OF).refuse(options)


def test_too_many_neighbours_are_warned_of() -> None:
    assert Pilot(tasks=OF).warnings() == []
    (warning,) = Pilot(tasks=OF, neighbours=3).warnings()
    assert "federate.strategy.neighbours = 3" in warning


PILOT = [
    "federate.projector={name = 'pilot', tasks = ['reports', 'scans']}",
    "federate.strategy={name = 'pilot', tasks = {clinic = 'reports', lab = 'scans', practice = 'scans'}}",
    "federate.adapter={rank = 2, alpha = 4}",
    "federate.rounds=3",
]


def done(config: Path, name: str, *overrides: str, command: str = "federate") -> Result:
    words = [word for each in (f"run={name}", *PILOT, *overrides) for word in ("--set", each)]
    return CliRunner().invoke(main, [command, str(config), *words])


def run_of(config: Path, name: str) -> Run:
    run = Run.find(load(config).build / "runs/study" / name)
    assert run is not None
    return run


def contents(run: Run) -> dict[str, object]:
    return {key: run.manifest[key] for key in ("projectors", "adapters", "local")}


@pytest.fixture(scope="module")
def own(sites_config: Path) -> Path:  # noqa: F811
    return apart(sites_config, "pilot")


@pytest.fixture(scope="module")
def piloted(own: Path) -> Path:
    """Three silos of two tasks, a run trained and judged."""
    for command in ("federate", "evaluate"):
        result = done(own, "piloted", command=command)
        assert result.exit_code == 0, result.output
    return own


def test_silos_have_projectors_of_their_own(piloted: Path) -> None:
    run = run_of(piloted, "piloted")
    own = {silo: run.projector(f"silos/{silo}.safetensors").state_dict() for silo in SILOS}
    for silo in ("lab", "practice"):
        assert torch.equal(own[silo]["task.scans.linear_1.weight"], own["lab"]["task.scans.linear_1.weight"])
    assert not torch.equal(own["clinic"]["router.weight"], own["lab"]["router.weight"])
    assert not torch.equal(own["clinic"]["cross.scans.linear_2.weight"], torch.zeros(32, 32))
    assert not own["clinic"]["cross.reports.linear_2.weight"].any()
    adapters = [run.adapter(f"silos/{silo}.safetensors") for silo in SILOS]
    assert any(not torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    rows = [json.loads(line) for line in (run.path / "history.jsonl").read_text().splitlines()]
    assert all("nearest_same_task" in row for row in rows if row["client"])


def test_what_is_frozen_stays_to_the_bit(own: Path) -> None:
    for rounds in (1, 2):
        assert done(own, f"r{rounds}", f"federate.rounds={rounds}").exit_code == 0
    one = run_of(own, "r1").projector("silos/clinic.safetensors").state_dict()
    # The first round leaves router and cross adapters as they begin.
    assert not one["router.weight"].any()
    assert not one["cross.scans.linear_2.weight"].any()
    assert one["client.linear_2.weight"].any()
    assert one["mask"].tolist() == [0.0, -1e4]
    two = run_of(own, "r2").projector("silos/clinic.safetensors").state_dict()
    assert two["mask"].tolist() == [0.0, 0.0]
    assert two["router.weight"].any()


def test_nothing_local_is_in_a_message(own: Path) -> None:
    services = {node: Service(load(own, ["run=afar", *PILOT]), silo) for node, silo in enumerate(SILOS, 10)}
    sent: list[Payload] = []

    class Listening(FakeLink):
        def send(self, node: int, kind: str, payload: Payload, seconds: float) -> str:
            sent.append(payload)
            sent.append(pack(self.services[node].handle(unpack(payload))) if kind == "train" else payload)
            return super().send(node, kind, payload, seconds)

    remote = federate(load(own, ["run=afar", *PILOT]), over(Listening(services)))
    assert any("task.scans.linear_1.weight" in message.text for message in sent)
    for message in sent:
        assert not any(word in message.text for word in ('"client.', '"cross.', '"router.', '"mask'))
    assert done(own, "near").exit_code == 0
    assert contents(remote) == contents(run_of(own, "near"))
    shutil.rmtree(remote.path / "local/clinic")
    with pytest.raises(UserError, match="keeps to itself is where it trained"):
        remote.projector("silos/clinic.safetensors")


def test_killed_and_rerun_ends_in_the_same_bytes(piloted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(server, "Progress", _killed_after_saving(server.Progress, Killed))
            with pytest.raises(Killed):
                federate(load(piloted, ["run=killed", *PILOT]))
    assert done(piloted, "killed").exit_code == 0
    assert contents(run_of(piloted, "killed")) == contents(run_of(piloted, "piloted"))


def test_another_part_of_its_own_is_noticed(piloted: Path, tmp_path: Path) -> None:
    run = run_of(piloted, "piloted")
    copy = run.path.with_name("other_part")
    shutil.copytree(run.path, copy)
    mine, other = (copy / f"local/{silo}/2.safetensors" for silo in ("clinic", "lab"))
    shutil.copy(other, mine)
    refused = done(piloted, "other_part", command="evaluate")
    assert refused.exit_code == 2
    assert "not what the run ended with" in " ".join(refused.output.split())


def test_equal_training_is_remembered(piloted: Path, tmp_path: Path) -> None:
    memo = f"memo.path={tmp_path}/memo"
    assert done(piloted, "first", memo).exit_code == 0
    assert done(piloted, "second", memo).exit_code == 0
    rows = [
        json.loads(line)
        for line in (run_of(piloted, "second").path / "history.jsonl").read_text().splitlines()
    ]
    assert all(row["recalled"] for row in rows if row["client"])
    assert contents(run_of(piloted, "second")) == contents(run_of(piloted, "piloted"))
    assert done(piloted, "third", memo, "federate.strategy.balance=5.0").exit_code == 0
    assert contents(run_of(piloted, "third")) != contents(run_of(piloted, "piloted"))


def test_a_benchmark_asks_its_own_silos(piloted: Path) -> None:
    result = done(piloted, "piloted", "evaluate.benchmarks.pope.silos=['lab']", command="evaluate")
    assert result.exit_code == 0, result.output
    scores = load(piloted).build / "scores/study/piloted"
    assert json.loads((scores / "pope.json").read_text())["counts"]["projectors"] == 1
    assert json.loads((scores / "loss.json").read_text())["counts"]["projectors"] == 3
    own = ("evaluate.benchmarks.pope.silos=['lab']", "evaluate.benchmarks.captions.silos=['clinic']")
    assert done(piloted, "piloted", *own, command="evaluate").exit_code == 0
    result = done(piloted, "piloted", *own, command="report")
    assert result.exit_code == 0, result.output
    out = load(piloted).build / "report/study"
    with (out / "scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["grouped by"] == "task"]
    assert {(row["benchmark"], row["metric"]) for row in rows} == {("own tasks", "score")}
    shown = {row["group"]: float(row["value"]) for row in rows}
    assert shown.keys() == {"pope: f1", "captions: CIDEr-D"}
    assert shown["pope: f1"] == json.loads((scores / "pope.json").read_text())["metrics"]["f1"]["value"]
    assert "task of lab" in (out / "report.md").read_text()
    refused = done(piloted, "piloted", "evaluate.benchmarks.pope.silos=['nobody']", command="evaluate")
    assert refused.exit_code == 2
    assert "nobody have no projectors" in " ".join(refused.output.split())


def test_it_grows_from_a_plain_projector(piloted: Path) -> None:
    plain = ["--set", "run=plain", "--set", "federate.rounds=1"]
    assert CliRunner().invoke(main, ["federate", str(piloted), *plain]).exit_code == 0
    initial = f"federate.initial={run_of(piloted, 'plain').path}"
    assert done(piloted, "grown", initial, "federate.rounds=0").exit_code == 0
    grown, before = run_of(piloted, "grown").projector(), run_of(piloted, "plain").projector()
    features = torch.randn(2, 4, before.d_vision)
    torch.testing.assert_close(grown(features), before(features), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("federate.projector={name = 'mlp2x_gelu'}", "trains the projector 'pilot'"),
        ("federate.strategy.tasks.practice=''", "are none of federate.projector.tasks"),
        ("federate.strategy.tasks={clinic = 'x', lab = 'scans', practice = 'scans'}", "x are none of"),
        ("federate.together=2", "set it to 1"),
        ("federate.strategy.update='path'", "averages where clients end"),
        ("federate.privacy={secure = true}", "has to see every client's update"),
    ],
)
def test_what_cannot_be_is_refused(own: Path, override: str, message: str) -> None:
    result = done(own, "refused", override)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
