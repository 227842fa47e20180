"""Flower itself: its simulation, and a deployment of real processes that are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_align import align_config, aligned  # noqa: F401
from test_sites import SILOS, Echo, projector, sites_config  # noqa: F401

from fedcmp.components import load
from fedcmp.federate.engines.flower import launch
from fedcmp.federate.engines.flower.keys import Keys
from fedcmp.federate.engines.flower.link import _backend
from fedcmp.federate.engines.flower.processes import free_port
from fedcmp.federate.engines.local import LocalEngine
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.run import run
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.errors import UserError

pytest.importorskip("flwr", reason="needs the extra [flower]")

PATIENCE = 480.0
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}


@pytest.fixture
def start() -> Iterator[object]:
    """Starts commands of ours in the background; whatever happens, none is left running."""
    running: list[subprocess.Popen] = []

    def popen(log: Path, *words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fedcmp", *words]
        with log.open("ab") as file:
            process = subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=file, stderr=file)
        running.append(process)
        return process

    yield popen
    for process in running:
        with suppress(ProcessLookupError):
            process.terminate()
    for process in running:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """This process computes with as many threads as the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def until(log: Path, words: str) -> None:
    """Wait until a log has these words."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if log.exists() and re.search(words, log.read_text()):
            return
        time.sleep(0.05)
    raise AssertionError(f"{log} never said {words!r}:\n{log.read_text() if log.exists() else ''}")


def words(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]


def missing(experiment: Experiment) -> dict[int, list[str]]:
    rows = map(json.loads, (experiment.run_path / "history.jsonl").read_text().splitlines())
    return {row["round"]: row["missing"] for row in rows if row["client"] is None}


class WithoutSome(LocalEngine):
    """The local engine with some clients missing in some rounds."""

    absent: dict[int, list[str]]

    @contextmanager
    def training(self, start: int) -> Iterator[object]:  # type: ignore[override]
        with super().training(start) as train:

            def some(jobs: Sequence[Job]) -> Sequence[LocalResult]:
                return train([job for job in jobs if job.client not in self.absent[job.round]])

            yield some


def test_the_simulation_ends_in_the_bytes_of_the_local_engine(
    sites_config: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    options = [
        "federate.strategy.name=fedcmp",
        "federate.communication={payload='low_rank',rank=2}",
        f"build={tmp_path}",
    ]
    command = [sys.executable, "-m", "fedcmp", "federate", str(sites_config), "--engine", "simulation"]
    done = subprocess.run(
        [*command, *words(*options, "run=simulated")],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    run(load(sites_config, [*options, "run=local"]))
    ours, theirs = (load(sites_config, [*options, f"run={name}"]) for name in ("local", "simulated"))
    assert projector(ours) == projector(theirs)


@pytest.mark.skipif("not config.getoption('--slow')")
def test_a_simulated_alignment_ends_in_the_bytes_of_the_local_engine(aligned: Path) -> None:  # noqa: F811
    command = [sys.executable, "-m", "fedcmp", "federate", str(aligned), "--engine", "simulation"]
    done = subprocess.run(
        [*command, *words("run=simulated")],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (load(aligned, [f"run={name}"]) for name in ("mor", "simulated"))
    assert projector(ours) == projector(theirs)


def test_simulated_nodes_get_a_gpu_each_where_there_are_some() -> None:
    code = """
import os, ray
from fedcmp.federate.engines.flower.link import _backend
given = _backend(False, "cuda")["client_resources"]
ray.init(num_cpus=8, num_gpus=4, include_dashboard=False, logging_level="error")
@ray.remote(**given)
class Node:
    def gpu(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]
nodes = [Node.remote() for _ in range(4)]
print(sorted(ray.get([node.gpu.remote() for node in nodes])))
"""
    environment = ENVIRONMENT | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout.strip().splitlines()[-1:] == ["['0', '1', '2', '3']"], done.stderr
    assert _backend(False, "cpu")["client_resources"]["num_gpus"] == 0
    assert _backend(True, "cuda:0")["init_args"] == {"num_cpus": 2, "num_gpus": 1}


def documented(language: str = "sh") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/sites.md").read_text(), re.DOTALL)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Certificates and keys, made by the commands of docs/sites.md."""
    authority, site_key = documented()[:2]
    folder = tmp_path / "keys"
    (folder / "known").mkdir(parents=True)
    scripts = [authority, *(site_key.replace("berlin", name) for name in (*SILOS, "stranger"))]
    for script in scripts:
        subprocess.run(["sh", "-ec", script], cwd=folder, check=True, capture_output=True)
    for name in SILOS:
        (folder / f"{name}.pub").rename(folder / "known" / f"{name}.pub")
    return folder


@pytest.mark.skipif("not config.getoption('--slow')")
def test_private_patients_in_the_simulation(sites_config: Path, tmp_path: Path) -> None:  # noqa: F811
    """What private sites answer travels as it should, and every one of them has a ledger."""
    options = [
        r"federate.privacy={unit='patient',patient='(\d)\.\w+$',clip=0.05,epsilon=4,secure=true}",
        f"ledger.path={tmp_path / 'ledger'}",
        f"build={tmp_path}",
    ]
    command = [sys.executable, "-m", "fedcmp", "federate", str(sites_config), "--engine", "simulation"]
    result = subprocess.run(
        [*command, *words(*options)],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    history = load(sites_config, options).run_path / "history.jsonl"
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["epsilon"] for row in rows] == pytest.approx([4.0] * 12)
    assert {row["loss"] for row in rows} == {None}
    assert len(list((tmp_path / "ledger").glob("*.json"))) == 3


@pytest.mark.usefixtures("one_thread")
def test_killed_servers_and_sites_of_a_real_deployment(
    sites_config: Path,  # noqa: F811
    keys: Path,
    tmp_path: Path,
    start,  # type: ignore[no-untyped-def]
) -> None:
    """TLS and node keys; the server is killed after a round, a site in the middle of a later one.

    The run ends in the bytes of the local engine with the same clients missing. SCAFFOLD and int8,
    because controls and residuals have to survive both.
    """
    options = ["federate.strategy.name=scaffold", "federate.communication.payload=int8"]
    options += ["federate.rounds=3", f"build={tmp_path}"]
    experiment = load(sites_config, [*options, "run=real"])
    address = f"127.0.0.1:{free_port()}"
    secured = ["--ca", str(keys / "ca.crt")]

    def site(silo: str, patience: float = PATIENCE) -> subprocess.Popen:
        place = [
            "--silo",
            silo,
            "--superlink",
            address,
            "--key",
            str(keys / silo),
            "--patience",
            f"{patience:g}",
        ]
        log = tmp_path / f"{silo}.log"
        return start(log, "site", str(sites_config), *words(*options, "run=real"), *place, *secured)

    def server(log: Path) -> subprocess.Popen:
        place = ["--engine", "flower", "--address", address, "--certificate", str(keys / "server.crt")]
        place += ["--key", str(keys / "server.key"), "--site-keys", str(keys / "known"), *secured]
        return start(
            log, "federate", str(sites_config), *words(*options, "sites.quorum=2", "run=real"), *place
        )

    sites = {silo: site(silo) for silo in SILOS}
    first = server(tmp_path / "first.log")
    until(tmp_path / "first.log", "round 1 of 3: 3 of 3 sites")
    deadline = time.monotonic() + PATIENCE
    while not (experiment.run_path / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    log = tmp_path / "second.log"
    second = server(log)
    until(log, "sites may come")
    stranger = Keys(ca=keys / "ca.crt", key=keys / "stranger")
    with refused("does not accept site 'clinic': .*code: 2004"):
        launch.site(Echo(), "clinic", address, stranger, patience=3)  # type: ignore[arg-type]
    until(log, "continuing after round 1 of 3")
    time.sleep(0.3)
    sites["practice"].send_signal(signal.SIGKILL)
    assert second.wait(PATIENCE) == 0, log.read_text()
    assert re.search(r"round 2 of 3: 2 of 3 sites in .* s; missing: practice", log.read_text())
    absent = missing(experiment)
    assert absent == {0: [], 1: ["practice"], 2: ["practice"]}
    replay = load(sites_config, [*options, "run=replay"])
    WithoutSome.absent = absent
    run(replay, WithoutSome)
    assert projector(replay) == projector(experiment)


@contextmanager
def refused(message: str) -> Iterator[None]:
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match=message):
            yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_a_port_where_nobody_answers(tmp_path: Path) -> None:
    began = time.monotonic()
    with refused(r"no server at 127.0.0.1:\d+ for 2 s: .*refused"):
        address = f"127.0.0.1:{free_port()}"
        launch.site(Echo(), "clinic", address, Keys(insecure=True), patience=2)  # type: ignore[arg-type]
    assert time.monotonic() - began < 30


def test_an_address_that_is_taken(sites_config: Path) -> None:  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UserError, match=f"--address {address}: cannot listen there .*in use"):
            launch.federate(load(sites_config), sites_config, (), address, Keys(insecure=True))


def test_without_keys_there_is_this_machine_alone(sites_config: Path) -> None:  # noqa: F811
    insecure = Keys(insecure=True)
    with pytest.raises(UserError, match=r"--address 0.0.0.0:1: --insecure is for 127.0.0.1 only"):
        launch.federate(load(sites_config), sites_config, (), "0.0.0.0:1", insecure)
    with refused(r"--superlink 10.0.0.1:1: --insecure is for 127.0.0.1 only"):
        launch.site(Echo(), "clinic", "10.0.0.1:1", insecure, 1)  # type: ignore[arg-type]


def test_keys_are_asked_for(sites_config: Path) -> None:  # noqa: F811
    experiment = load(sites_config)
    with pytest.raises(UserError, match="give --certificate, --key and --site-keys, or --insecure"):
        launch.federate(experiment, sites_config, (), "127.0.0.1:1", Keys())
    with refused("give --ca and --key, or --insecure within one machine"):
        launch.site(Echo(), "clinic", "127.0.0.1:1", Keys(), 1)  # type: ignore[arg-type]
