"""Updates in files: the same bytes, memory that does not grow with clients, and nothing left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import bench_aggregation
import pytest
import torch
from conftest import ROOT
from test_strategies import NAMES, begun, clients, make

from fedcmp.federate.arithmetic.updates import Memory, State, Update
from fedcmp.federate.messages import LocalResult
from fedcmp.federate.server.arrivals import ARRIVALS, Arrivals
from fedcmp.federate.strategies.base import Aggregate, Strategy
from fedcmp.pipeline.models.projector import content_hash


def kept(arrivals: Arrivals, update: Update) -> Update:
    sent = LocalResult(update.client, update.state, 1.0, update.samples, 1, 1, 1.0, gradient=update.gradient)
    there = arrivals.kept(sent)
    return replace(update, state=there.state, gradient=there.gradient)


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_makes_the_same_of_files(tmp_path: Path, name: str) -> None:
    """Also once the files of a round are gone, as memory goes on to the next."""
    options = {"clip": 0.5} if name == "fedcmp" else {}
    strategy = make(name, **options)

    def two_rounds(files: bool) -> Aggregate:
        result = begun(strategy)
        for round_ in range(3):
            with Arrivals(tmp_path / ARRIVALS).opened() as arrivals:
                updates = clients(5, round_)
                sent = [kept(arrivals, update) for update in updates] if files else updates
                result = strategy.aggregate(result.state, sent, result.memory)
        return result

    ours, theirs = two_rounds(True), two_rounds(False)
    assert content_hash(ours.state) == content_hash(theirs.state)
    assert ours.memory.keys() == theirs.memory.keys()
    assert all(torch.equal(ours.memory[key], theirs.memory[key]) for key in ours.memory)
    assert ours.figures == theirs.figures
    assert not (tmp_path / ARRIVALS).exists()


def test_what_is_in_files_is_what_was_sent(tmp_path: Path) -> None:
    sent: State = {
        "matrix": torch.randn(5, 7).T,
        "empty": torch.empty(0, 3),
        "half": torch.randn(3).bfloat16(),
        "number": torch.tensor(2.5),
    }
    with Arrivals(tmp_path / "there").opened() as arrivals:
        there = arrivals.kept(LocalResult("a", sent, 1.0, 1, 1, 1, 1.0)).state
        assert list(there) == list(sent)
        for name, tensor in sent.items():
            assert torch.equal(there[name], tensor)
            assert (there[name].dtype, there[name].shape) == (tensor.dtype, tensor.shape)
        there["matrix"].zero_()
        assert torch.equal(there["matrix"], sent["matrix"])
        with pytest.raises(KeyError):
            there["none"]
        held = there["matrix"]
    assert torch.equal(held, sent["matrix"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method", ["fedavg", "exact"])
def test_memory_does_not_grow_with_the_number_of_clients(method: str) -> None:
    """Measured in processes of their own: peak beyond libraries, over whole rounds of the server."""
    few, many = (bench_aggregation.served(method, number, 512) for number in (8, 64))
    assert many["peak"] <= 1.2 * few["peak"]
    assert many["peak"] < many["sent"]
    assert few["left"] == many["left"] == 0


class Holding(Strategy):
    """A strategy as plugins may be: it remembers what it was given."""

    def aggregate(self, state: State, updates: list[Update], memory: Memory) -> Aggregate:  # type: ignore[override]
        return Aggregate({**updates[0].state}, {f"last/{n}": t for n, t in updates[0].state.items()})


def test_what_a_strategy_keeps_stays_whole(tmp_path: Path) -> None:
    first = clients(1)[0]
    with Arrivals(tmp_path / "there").opened() as arrivals:
        result = Holding().aggregate({}, [kept(arrivals, first)], {})
    torch.save(result.memory, tmp_path / "memory.pt")
    again = torch.load(tmp_path / "memory.pt", weights_only=True)
    assert all(torch.equal(again[f"last/{name}"], tensor) for name, tensor in first.state.items())
    assert (tmp_path / "memory.pt").stat().st_size < 20_000


SLOW = pytest.mark.skipif("not config.getoption('--slow')")


@pytest.mark.parametrize(
    "sent",
    [
        signal.SIGKILL,
        *(pytest.param(each, marks=SLOW) for each in (signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_nothing_is_left_of_a_run_that_was_stopped(
    extracted: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    def command(run: str) -> list[str]:
        words = [f"build={tmp_path}", f"run={run}", "federate.rounds=8", "federate.passes=2"]
        words += ["federate.strategy.name=fedcmp"]
        sets = [word for each in words for word in ("--set", each)]
        return [sys.executable, "-m", "fedcmp", "federate", str(extracted), *sets]

    folder = tmp_path / "runs/study/stopped"
    process = subprocess.Popen(command("stopped"), cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob(f"{ARRIVALS}/*")):
        time.sleep(0.002)
    process.send_signal(sent)
    process.wait()
    if sent != signal.SIGKILL:
        assert not (folder / ARRIVALS).exists()
    else:
        # As if the run had been killed in the midst of a file.
        (folder / ARRIVALS).mkdir(exist_ok=True)
        (folder / ARRIVALS / "0").write_bytes(b"half")
    assert not (folder / "manifest.json").exists()
    for run in ("stopped", "whole"):
        subprocess.run(command(run), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert not (folder / ARRIVALS).exists()
    whole = folder.with_name("whole") / "projector.safetensors"
    assert (folder / "projector.safetensors").read_bytes() == whole.read_bytes()
