"""Rounds over sites without Flower: messages, refusals, quorum, time-outs, late and returning sites."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
from conftest import write_llava
from safetensors.torch import load_file

from fedcmp.cli import main
from fedcmp.components import load
from fedcmp.federate.arithmetic.updates import Objective
from fedcmp.federate.engines.base import terms
from fedcmp.federate.engines.flower import daemon
from fedcmp.federate.engines.link import Failure
from fedcmp.federate.engines.service import Service
from fedcmp.federate.engines.sites import Sites
from fedcmp.federate.engines.wire import Payload, job_as_dict, job_of, pack, result_as_dict, result_of, unpack
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.privacy.accounting import spent
from fedcmp.federate.run import run
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError

SILOS = ("clinic", "lab", "practice")
QUICK = ["sites.round_timeout=3", "sites.join_timeout=1"]


@pytest.fixture(scope="session")
def sites_config(extracted: Path) -> Path:
    """An experiment of three extracted silos."""
    from click.testing import CliRunner

    root = extracted.parent
    write_llava(root / "practice", 16, first=200)
    path = root / "sites.toml"
    path.write_text(
        f"""
extends = "experiment.toml"

[extract.silos.practice]
name = "llava_json"
path = "{root}/practice/pairs.json"
images = "{root}/practice"

[federate]
silos = ["clinic", "lab", "practice"]
"""
    )
    result = CliRunner().invoke(main, ["extract", str(path)])
    assert result.exit_code == 0, result.output
    return path


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_messages_come_back_as_they_were() -> None:
    projector = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(projector.parameters())
    projector(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    job = Job(
        client="lab",
        start=state,
        turn=1,
        round=2,
        rounds=3,
        objective=Objective(0.1, {name: 2 * tensor for name, tensor in state.items()}),
        wants=frozenset({"gradient", "alignment"}),
        optimizer=optimizer.state_dict(),
    )
    again = job_of(unpack(pack(job_as_dict(job))))
    assert same(vars(again.objective), vars(job.objective))
    assert again.wants == job.wants
    assert same(job_as_dict(again)["start"], state)
    assert same(again.optimizer, json_like(job.optimizer))
    optimizer.load_state_dict(again.optimizer)
    result = LocalResult("lab", state, 0.5, 4, 1, 20, 0.1, alignment={"weight": 0.25})
    assert same(vars(result_of(unpack(pack(result_as_dict(result))))), vars(result))


def json_like(value: object) -> object:
    """Tuples become lists."""
    if isinstance(value, dict):
        return {key: json_like(each) for key, each in value.items()}
    return [json_like(each) for each in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    "spoiled",
    [
        Payload("{}", b"garbage"),
        Payload("not json", pack({}).tensors),
        Payload('{"a": {"$tensor": "7"}}', pack({}).tensors),
        Payload('{"a": {"$tensor": []}}', pack({}).tensors),
        Payload('{"$items": 3}', pack({}).tensors),
        Payload('{"$items": [[[], 1]]}', pack({}).tensors),
        Payload('{"a": NaN}', pack({}).tensors),
        Payload("1" * 5000, pack({}).tensors),
        Payload("[" * 100_000, pack({}).tensors),
        Payload("[" * 900 + "]" * 900, pack({}).tensors[:5]),
    ],
)
def test_what_is_no_message_is_refused(spoiled: Payload) -> None:
    with pytest.raises(ValueError, match=r"not a message|Expecting value"):
        unpack(spoiled)


class FakeLink:
    """Services in this process behind a link that can lose, delay and refuse."""

    def __init__(self, services: dict[int, Service]) -> None:
        self.services = services
        self.sent: list[tuple[int, str]] = []
        self.mute: dict[int, float] = {}
        self.on_train: Callable[[int], None] = lambda node: None
        self._ready: dict[str, tuple[float, Payload | Failure]] = {}

    def nodes(self) -> set[int]:
        return set(self.services)

    def send(self, node: int, kind: str, payload: Payload, seconds: float) -> str:
        name = f"m{len(self.sent)}"
        self.sent.append((node, kind))
        if node not in self.services:
            return name
        answer: Payload | Failure
        try:
            answer = pack(self.services[node].handle(unpack(payload)))
        except ValueError as error:
            answer = Failure(str(error))
        delay = self.mute.pop(node, 0.0) if kind == "train" else 0.0
        self._ready[name] = time.monotonic() + delay, answer
        if kind == "train":
            self.on_train(node)
        return name

    def receive(self, messages: Iterable[str]) -> dict[str, Payload | Failure]:
        due = [name for name in messages if name in self._ready and self._ready[name][0] <= time.monotonic()]
        return {name: self._ready.pop(name)[1] for name in due}


@pytest.fixture(scope="module")
def services(sites_config: Path) -> dict[int, Service]:
    experiment = load(sites_config)
    return {node: Service(experiment, silo) for node, silo in enumerate(SILOS, 10)}


def over(link: FakeLink) -> Callable[[Experiment, object], Sites]:
    return lambda experiment, _: Sites(experiment, link)  # type: ignore[arg-type]


def projector(experiment: Experiment) -> bytes:
    return (experiment.run_path / "projector.safetensors").read_bytes()


def rows(experiment: Experiment) -> list[dict]:
    lines = (experiment.run_path / "history.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("seconds", "bytes"))}
        for line in lines
    ]


@pytest.mark.parametrize(
    "options",
    [
        ["federate.strategy.name=fedcmp"],
        ["federate.strategy.name=scaffold", "federate.optimizer.carry=true"],
        ["federate.strategy.name=local_only"],
        ["federate.strategy.name=pivotmerge", "federate.clients_per_round=2"],
    ],
    ids=["fedcmp", "scaffold", "local_only", "pivotmerge"],
)
def test_sites_end_in_the_bytes_of_the_local_engine(
    sites_config: Path, options: list[str], tmp_path: Path
) -> None:
    local, remote = (
        load(sites_config, [*options, *QUICK, f"run={name}", f"build={tmp_path}"])
        for name in ("local", "remote")
    )
    run(local)
    run(remote, over(FakeLink({node: Service(remote, silo) for node, silo in enumerate(SILOS)})))
    assert projector(local) == projector(remote)
    assert rows(local) == rows(remote)
    travelled = [json.loads(line) for line in (remote.run_path / "history.jsonl").read_text().splitlines()]
    there_and_back = 2 * len(projector(remote)) * (2 if "federate.clients_per_round=2" in options else 3)
    assert all(row["bytes"] > there_and_back for row in travelled if row["client"] is None)


@pytest.mark.parametrize("strategy", ["{name='fedcmp',reliability='none'}", "{name='fedadam'}"])
def test_secure_runs_equal_plain_ones_on_every_engine(
    sites_config: Path, strategy: str, tmp_path: Path
) -> None:
    options = [f"federate.strategy={strategy}", f"build={tmp_path}", *QUICK]
    plain = load(sites_config, [*options, "run=plain"])
    local, remote = (
        load(sites_config, [*options, "federate.privacy.secure=true", f"run={run_}"])
        for run_ in ("local", "remote")
    )
    run(plain)
    run(local)
    link = FakeLink({node: Service(remote, silo) for node, silo in enumerate(SILOS)})
    run(remote, over(link))
    assert projector(local) == projector(remote)
    ours, theirs = (load_file(each.run_path / "projector.safetensors") for each in (plain, local))
    for key, tensor in ours.items():
        assert float((tensor - theirs[key]).norm() / tensor.norm()) < 1e-4
    for row in rows(remote):
        assert "update_norm" not in row or row["client"] is None


def test_no_update_leaves_its_site_in_a_secure_run(sites_config: Path, tmp_path: Path) -> None:
    """What the server gets from training has no tensor at all."""
    remote = load(sites_config, ["federate.privacy.secure=true", f"build={tmp_path}", *QUICK])
    seen = []

    class Watched(Service):
        def handle(self, request: dict) -> dict:
            reply = super().handle(request)
            seen.append((request["kind"], pack(reply)))
            return reply

    run(remote, over(FakeLink({node: Watched(remote, silo) for node, silo in enumerate(SILOS)})))
    trained = [payload for kind, payload in seen if kind == "train"]
    assert len(trained) == 9
    assert all(payload.tensors == pack({}).tensors for payload in trained)


def test_a_site_lost_within_a_secure_round_is_left_out(
    sites_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its mask is recovered from the others; the result is that of the others alone."""
    root = sites_config.parent
    write_llava(root / "fourth", 12, first=300)
    four = ["federate.silos=['clinic','lab','practice','heldout4']", f"build={tmp_path}", *QUICK]
    four += [
        f"extract.silos.heldout4={{name='llava_json',path='{root}/fourth/pairs.json',images='{root}/fourth'}}"
    ]
    from click.testing import CliRunner

    words = [word for each in four for word in ("--set", each)]
    assert CliRunner().invoke(main, ["extract", str(sites_config), *words]).exit_code == 0
    four += ["federate.privacy.secure=true", "sites.quorum=3", "federate.rounds=1"]
    experiment = load(sites_config, four)
    clients = {node: Service(experiment, silo) for node, silo in enumerate(experiment.federate.silos)}

    class Dies(Service):
        def handle(self, request: dict) -> dict:
            if request.get("step", {}).get("step") == "mask":
                raise UserError("gone")
            return super().handle(request)

    clients[2] = Dies(experiment, "practice")
    run(experiment, over(FakeLink(clients)))
    assert "practice dropped out of the secure sum: gone" in capsys.readouterr().out
    assert [row["missing"] for row in rows(experiment) if row["client"] is None] == [["practice"]]
    private = load(
        sites_config, [*four, "federate.privacy.clip=0.1", "federate.privacy.noise_multiplier=2.0", "run=p"]
    )
    clients = {node: Service(private, silo) for node, silo in enumerate(private.federate.silos)}
    run(private, over(FakeLink(clients | {2: Dies(private, "practice")})))
    (epsilon,) = (row["epsilon"] for row in rows(private) if row["client"] is None)
    assert epsilon == pytest.approx(spent([2.0 * sqrt(3 / 4)], 1e-5))
    others = load(
        sites_config,
        [*four, "federate.privacy.secure=false", "federate.silos=['clinic','lab','heldout4']", "run=o"],
    )
    run(others)
    ours, theirs = (load_file(each.run_path / "projector.safetensors") for each in (experiment, others))
    for key, tensor in ours.items():
        assert float((tensor - theirs[key]).norm() / tensor.norm()) < 1e-4


def test_a_site_that_restarts_has_not_forgotten_what_it_gave(sites_config: Path, tmp_path: Path) -> None:
    """Trained again, its update is the same, and so may be its sums."""
    options = ["federate.privacy.secure=true", "federate.rounds=1", f"build={tmp_path}", *QUICK]
    remote = load(sites_config, options)
    services = {node: Service(remote, silo) for node, silo in enumerate(SILOS)}
    run(remote, over(FakeLink(services)))
    (ledger,) = (remote.run_path / "releases").glob("clinic-*.json")
    given = ledger.read_bytes()
    assert len(json.loads(given)["0"]["sums"]) == 1
    expected = projector(remote)
    for name in ("manifest.json", "projector.safetensors", "history.jsonl"):
        (remote.run_path / name).unlink()
    run(remote, over(FakeLink({node: Service(remote, silo) for node, silo in enumerate(SILOS)})))
    assert projector(remote) == expected
    assert ledger.read_bytes() == given
    # The server now begins elsewhere, and asks for a sum of nearly the same update.
    for name in ("manifest.json", "projector.safetensors", "history.jsonl"):
        (remote.run_path / name).unlink()
    initial = tmp_path / "initial.safetensors"
    initial.write_bytes(expected)
    other = load(sites_config, [*options, f"federate.initial={initial}", "sites.round_timeout=5"])
    with pytest.raises(UserError, match="has given sums of round 1 from another projector"):
        run(other, over(FakeLink({node: Service(remote, silo) for node, silo in enumerate(SILOS)})))


def test_an_answer_that_cannot_be_read_counts_as_none(
    sites_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = quorum_of_two(sites_config, tmp_path, "federate.rounds=1")

    class Odd(Service):
        def handle(self, request: dict) -> dict:
            return super().handle(request) if request["kind"] == "hello" else {"result": {"state": 1}}

    services = {node: Service(experiment, silo) for node, silo in enumerate(SILOS)}
    services[1] = Odd(experiment, "lab")
    run(experiment, over(FakeLink(services)))
    assert "missing: lab: sent an answer that cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["federate.strategy.name=krum"], "strategy 'krum', as configured, has to see every client's update"),
        (["federate.strategy={name='fedcmp',basis='randomised'}"], "as configured, has to see every"),
        (["federate.strategy.name=local_only"], "has to see every client's update"),
        (["federate.optimizer.carry=true"], "moments that clients carry on would reveal their updates"),
        (["federate.clients_per_round=2"], "a sum over 2 clients hides nobody; at least 3 must take part"),
        (
            ["federate.strategy.name=fedcmp"],
            "2 sums of the same updates over 3 clients hides nobody; at least 4",
        ),
    ],
)
def test_what_cannot_be_secure_is_said(
    sites_config: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    experiment = load(sites_config, ["federate.privacy.secure=true", f"build={tmp_path}", *overrides])
    with pytest.raises(UserError, match=message):
        run(experiment)


def quorum_of_two(config: Path, build: Path, *more: str) -> Experiment:
    return load(config, [*QUICK, "sites.quorum=2", "run=quorum", f"build={build}", *more])


def test_a_slow_site_is_left_out_and_its_late_answer_dropped(
    sites_config: Path, services: dict[int, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = FakeLink(services)
    link.mute = {12: 3.3}
    experiment = quorum_of_two(sites_config, tmp_path)

    def linger(node: int) -> None:
        if len(link.sent) > 6:
            time.sleep(0.3)

    link.on_train = linger
    run(experiment, over(link))
    said = capsys.readouterr().out
    assert "round 1 of 3: 2 of 3 sites" in said
    assert "missing: practice: no answer within sites.round_timeout = 3 s" in said
    assert "practice answered an earlier round too late; its answer is dropped" in said
    missing = [row["missing"] for row in rows(experiment) if row["client"] is None]
    assert missing == [["practice"], [], []]


def test_too_few_sites_end_the_round_and_the_run_goes_on_later(
    sites_config: Path, services: dict[int, Service], tmp_path: Path
) -> None:
    """Without a quorum nothing is aggregated; the same command continues to the same bytes."""
    experiment = load(sites_config, [*QUICK, "run=few", f"build={tmp_path}"])
    link = FakeLink(dict(services))

    def leave(node: int) -> None:
        if [kind for _, kind in link.sent].count("train") == 5:
            del link.services[12]

    link.on_train = leave
    with pytest.raises(
        UserError, match=r"round 2 of 3: 2 of 3 sites answered, fewer than the 3 of sites.quorum"
    ):
        run(experiment, over(link))
    run(experiment, over(FakeLink(services)))
    whole = load(sites_config, ["run=whole", f"build={tmp_path}"])
    run(whole)
    assert projector(experiment) == projector(whole)


def test_a_site_that_leaves_and_returns_does_the_same_round(
    sites_config: Path, services: dict[int, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = load(sites_config, ["sites.round_timeout=20", "run=back", f"build={tmp_path}"])
    link = FakeLink(dict(services))
    link.mute = {12: 1e9}

    def restart(node: int) -> None:
        if node == 12:
            link.services[99] = link.services.pop(12)

    link.on_train = restart
    run(experiment, over(link))
    said = capsys.readouterr().out
    assert said.index("practice has left") < said.index("round 1 of 3: 3 of 3 sites")
    whole = load(sites_config, ["run=whole", f"build={tmp_path}"])
    run(whole)
    assert projector(experiment) == projector(whole)


def test_a_site_that_never_came_is_named(
    sites_config: Path, services: dict[int, Service], tmp_path: Path
) -> None:
    experiment = load(sites_config, [*QUICK, "sites.quorum=1", f"build={tmp_path}"])
    link = FakeLink({node: services[node] for node in (10, 11)})
    with pytest.raises(
        UserError, match=r"only 2 of 3 sites joined within sites.join_timeout = 1 s; missing: practice"
    ):
        run(experiment, over(link))


def interrupted(sites_config: Path, tmp_path: Path) -> tuple[Experiment, dict[int, Service]]:
    """A run of four rounds whose server was killed in the second, and its sites."""
    experiment = quorum_of_two(sites_config, tmp_path, "federate.rounds=4")
    everyone = {node: Service(experiment, silo) for node, silo in enumerate(SILOS)}

    class Killed(BaseException):
        pass

    link = FakeLink(everyone)

    def kill(node: int) -> None:
        if [kind for _, kind in link.sent].count("train") == 5:
            raise Killed

    link.on_train = kill
    with pytest.raises(Killed):
        run(experiment, over(link))
    return experiment, everyone


def test_another_cache_after_an_interruption_is_refused(sites_config: Path, tmp_path: Path) -> None:
    experiment, everyone = interrupted(sites_config, tmp_path)
    checkpoint = (experiment.run_path / "checkpoint.pt").read_bytes()
    everyone[1]._card = replace(everyone[1]._card, content="0" * 64)
    whole = quorum_of_two(sites_config, tmp_path, "federate.rounds=4", "sites.quorum=3")
    with pytest.raises(UserError, match="site 'lab' came back with another cache than this run began with"):
        run(whole, over(FakeLink(everyone)))
    assert (experiment.run_path / "checkpoint.pt").read_bytes() == checkpoint
    run(experiment, over(FakeLink(everyone)))
    missing = [row["missing"] for row in rows(experiment) if row["client"] is None]
    assert missing == [[], ["lab"], ["lab"], ["lab"]]


def test_a_site_that_cannot_be_understood_does_not_end_the_server(
    sites_config: Path, services: dict[int, Service], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Other(Service):
        def handle(self, request: dict) -> dict:
            return {"silo": "practice"}

    experiment = load(sites_config, [*QUICK, f"build={tmp_path}"])
    odd = {node: services[node] for node in (10, 11)} | {12: Other(experiment, "practice")}
    with pytest.raises(UserError, match="only 2 of 3 sites joined"):
        run(experiment, over(FakeLink(odd)))
    assert "a site cannot be understood (card: Field required)" in capsys.readouterr().out


def test_after_an_interruption_a_quorum_is_enough(
    sites_config: Path, services: dict[int, Service], tmp_path: Path
) -> None:
    experiment, everyone = interrupted(sites_config, tmp_path)
    run(experiment, over(FakeLink({node: everyone[node] for node in (0, 2)})))
    missing = [row["missing"] for row in rows(experiment) if row["client"] is None]
    assert missing == [[], ["lab"], ["lab"], ["lab"]]


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("federate.optimizer.learning_rate=0.5", "federate.optimizer.learning_rate: 0.01 here, 0.5 there"),
        ("seed=7", "seed: 0 here, 7 there"),
        ("federate.strategy.name=fedcmp", 'federate.strategy.basis: null here, "exact" there'),
    ],
)
def test_a_site_with_another_experiment_is_refused(
    sites_config: Path, services: dict[int, Service], tmp_path: Path, override: str, where: str
) -> None:
    experiment = load(sites_config, [*QUICK, f"build={tmp_path}"])
    odd = Service(load(sites_config, [override]), "practice")
    with pytest.raises(UserError, match="site 'practice' has agreed to something else") as caught:
        run(experiment, over(FakeLink({**services, 12: odd})))
    assert where in str(caught.value)


def test_a_site_refuses_what_it_has_not_agreed_to(sites_config: Path, services: dict[int, Service]) -> None:
    experiment, service = load(sites_config), services[10]
    hello = service.handle({"kind": "hello"})
    agreed = hello["terms"]
    assert agreed == terms(experiment, service._card)
    file = next(name for name in agreed["language"]["files"] if name.endswith(".safetensors"))

    def asked(silo: str = "clinic", **changes: object) -> dict:
        return {"kind": "train", "silo": silo, "terms": {**agreed, **changes}}

    other = {**agreed["language"], "files": {**agreed["language"]["files"], file: "0" * 64}}
    for request, complaint in (
        (asked(language=other), rf"refuses a task .*language.files.{file}: .* here, \"0000"),
        (asked(features={**agreed["features"], "dtype": "float32"}), "refuses a task .*features.dtype"),
        (asked(federate={**agreed["federate"], "rounds": 99}), "federate.rounds: 3 here, 99 there"),
        (asked(silo="lab"), "site 'clinic' refuses a task for silo 'lab'"),
    ):
        with pytest.raises(UserError, match=complaint):
            service.handle(request)


def test_what_cannot_run_over_sites_is_refused(sites_config: Path) -> None:
    for override, message in (
        ("federate.strategy.name=centralised", "pools the silos' data"),
        ("federate.together=2", "federate.together = 2: sites train alone"),
    ):
        with pytest.raises(UserError, match=message):
            Service(load(sites_config, [override]), "clinic")
    with pytest.raises(
        UserError, match=r"--silo labb: not in federate.silos; there are clinic, lab, practice"
    ):
        Service(load(sites_config), "labb")


class Echo:
    """Stands in for a service where only the way there matters."""

    def handle(self, request: dict) -> dict:
        if "fail" in request:
            raise UserError(request["fail"])
        return request


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Path, socket.socket]]:
    server = daemon.listen(tmp_path / "s")
    thread = threading.Thread(target=daemon.serve, args=(server, Echo()))
    thread.start()
    yield tmp_path / "s", server
    server.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    assert not thread.is_alive()
    server.close()


def test_the_daemon_answers_refuses_and_goes_on(running: tuple[Path, socket.socket]) -> None:
    path, _ = running
    value = {"x": torch.arange(3_000_000.0), "y": [1, None, "é"]}
    for _ in range(2):
        payload = pack(value)
        assert same(unpack(Payload(*daemon.ask(path, (payload.text, payload.tensors), 10))), value)
        failing = pack({"fail": "not today"})
        with pytest.raises(ValueError, match="not today"):
            daemon.ask(path, (failing.text, failing.tensors), 10)
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(path))
            rude.sendall(b"half a message")


def test_a_daemon_that_is_gone_or_hangs_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(daemon.SiteGoneError, match="does not answer"):
        daemon.ask(tmp_path / "nobody", ("{}", b""), 1)
    server = daemon.listen(tmp_path / "mute")
    began = time.monotonic()
    with pytest.raises(daemon.SiteGoneError, match="timed out"):
        daemon.ask(tmp_path / "mute", ("{}", b""), 0.3)
    assert time.monotonic() - began < 5
    server.accept()[0].close()
    threading.Thread(target=lambda: server.accept()[0].close()).start()
    with pytest.raises(daemon.SiteGoneError):
        daemon.ask(tmp_path / "mute", ("{}", b""), 5)
    server.close()
