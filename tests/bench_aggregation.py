"""Time, memory and accuracy of aggregation at LLaVA-1.5-7B size: python tests/bench_aggregation.py [--small]

With `--clients 8,256 [--width 4096]`: the server's peak memory over whole rounds by number of clients, whose
updates arrive one after the other. Needs 84 MB of disk a client at the full width.

Eight clients, float32. Every method runs in a process of its own, so that its peak memory is its
own. `naive` is the plain way: SVDs of each matrix's updates √p_k D_k, side by side and one below the other.
The others run two rounds, the second with a memory; seconds are the faster round, memory is the
peak over both, with all libraries and without what they take before there are any data.
`--small` is a smoke run without gates. Linux only (/proc).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fedcmp.federate.arithmetic.updates import State, Update, data_weights
from fedcmp.federate.strategies.base import Strategy
from fedcmp.federate.strategies.fedavg import FedAvg
from fedcmp.federate.strategies.fedcmp import FedCmp
from fedcmp.pipeline.models.projector import content_hash

CLIENTS = 8
METHODS: dict[str, Strategy | None] = {
    "naive": None,
    "fedavg": FedAvg(),
    "exact": FedCmp(),
    "first formulation": FedCmp(sides="left", floor=1e-3, length="fused", momentum=0.3),
    "exact, rank 128": FedCmp(rank=128),
    "randomised": FedCmp(basis="randomised"),
}


def make_round(small: bool) -> tuple[State, list[Update]]:
    """Updates that share half of their directions, of decaying spectrum, over a floor of noise."""
    d_in, d_out, rank = (64, 256, 32) if small else (1024, 4096, 256)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shapes = {"linear_1.weight": (d_out, d_in), "linear_1.bias": (d_out,)}
    shapes |= {"linear_2.weight": (d_out, d_out), "linear_2.bias": (d_out,)}
    state = {name: 0.02 * draw(*shape) for name, shape in shapes.items()}
    shared = {name: (draw(s[0], rank), draw(rank, s[-1])) for name, s in shapes.items()}
    decay = torch.arange(1.0, rank + 1) ** -1
    updates = []
    for k in range(CLIENTS):
        new = {}
        for name, shape in shapes.items():
            step = 1e-5 * draw(*shape)
            if len(shape) == 2:
                left, right = shared[name]
                step += 1e-4 * (left * decay) @ (right + 0.5 * draw(rank, shape[1]))
                step += 1e-4 * (draw(shape[0], rank) * decay) @ draw(rank, shape[1])
            new[name] = state[name] + step
        updates.append(Update(f"client{k}", new, 100 * (k + 1)))
    return state, updates


def naive(state: State, updates: list[Update]) -> dict[str, torch.Tensor]:
    """New matrices of the first round of Fed-CMP's defaults, and eigenpairs of L, the plain way."""
    defaults, shares, result = FedCmp(), data_weights(updates), {}
    for name in (name for name, old in state.items() if old.ndim == 2):
        parts = [shares[u.client] ** 0.5 * (u.state[name] - state[name]) for u in updates]
        u, left, _ = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
        _, right, vh = torch.linalg.svd(torch.cat(parts, dim=0), full_matrices=False)
        mean = sum(shares[c.client] ** 0.5 * part for c, part in zip(updates, parts, strict=True))
        coefficients = u.T @ mean @ vh.T
        values = left.double() ** 2
        for axis, each in enumerate((values, right.double() ** 2)):
            gains = (each / each[0] + defaults.floor).float() ** -0.5
            coefficients = coefficients * gains[(slice(None), None) if axis == 0 else (None, slice(None))]
        step = u @ coefficients @ vh * (values.sum().sqrt() / coefficients.double().norm())
        result[name] = state[name] + defaults.server_learning_rate * step.float()
        result[f"values/{name}"] = values / values.sum()
        print(f"  naive {name}: done", file=sys.stderr, flush=True)
    return result


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def held() -> int:
    """Resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def measure(method: str, small: bool, out: Path) -> None:
    """One method in this process; writes the first round's new projector, and figures."""
    libraries = peak()
    state, updates = make_round(small)
    sent = sum(t.nbytes for u in updates for t in u.state.values())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the updates
    strategy, seconds = METHODS[method], []
    memory: dict[str, torch.Tensor] = {}
    for round_ in range(2 if strategy else 1):
        start = time.perf_counter()
        if strategy is None:
            new = naive(state, updates)
        else:
            result = strategy.aggregate(state, updates, memory)
            new, memory = result.state, result.memory
            del result
        seconds.append(time.perf_counter() - start)
        print(f"  {method} round {round_}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
        if round_ == 0:
            torch.save(new, out / "new.pt")
        del new
    highest = peak()
    torch.save({key: tensor for key, tensor in memory.items() if "vectors/" in key}, out / "vectors.pt")
    figures = {"seconds": min(seconds), "memory": highest / sent, "own": (highest - libraries) / sent}
    torch.save(figures, out / "figures.pt")


def serve(method: str, clients: int, width: int, folder: Path) -> None:
    """Two rounds of the server in this process; prints bytes and seconds as JSON.

    Bytes are what it takes at its peak beyond libraries, what the clients send, and what it leaves on disk.
    """
    from fedcmp.federate.messages import Job, LocalResult
    from fedcmp.federate.server.arrivals import Arrivals
    from fedcmp.federate.server.progress import Progress
    from fedcmp.federate.server.rounds import run_rounds

    shapes = {"linear_1.weight": (width, width // 4), "linear_1.bias": (width,)}
    shapes |= {"linear_2.weight": (width, width), "linear_2.bias": (width,)}
    seconds = [0.0]

    def draw(seed: int, size: float, start: State) -> State:
        generator, began = torch.Generator().manual_seed(seed), time.perf_counter()
        new = {name: torch.randn(old.shape, generator=generator).mul_(size) for name, old in start.items()}
        drawn = {name: step.add_(start[name]) for name, step in new.items()}
        seconds[0] -= time.perf_counter() - began
        return drawn

    def train(jobs: Sequence[Job]) -> Iterator[LocalResult]:
        for place, job in enumerate(jobs):
            # Some are far too long, so that they are shortened.
            size = 1e-3 if place % 8 else 1e-2
            yield LocalResult(job.client, draw(place, size, job.start), 1.0, 1 + place, 1, 1, 1.0)

    def rounds(shapes: dict[str, tuple[int, ...]], clients: int, folder: Path) -> State:
        state = draw(0, 0.02, {name: torch.zeros(shape) for name, shape in shapes.items()})
        names = [f"client{place:03d}" for place in range(clients)]
        strategy = METHODS[method]
        assert strategy is not None
        with Arrivals(folder / "arrivals").opened() as arrivals:
            return run_rounds(
                Progress(state, memory=strategy.begin(state, dict.fromkeys(names, 1))),
                strategy,
                [names, names],
                train,
                carry=False,
                history_path=folder / "history.jsonl",
                checkpoint=lambda progress: progress.save(folder / "checkpoint.pt", ""),
                arrivals=arrivals,
            ).state

    # Libraries are loaded when they are first used.
    rounds({name: tuple(16 for _ in shape) for name, shape in shapes.items()}, 2, folder)
    libraries = held()
    Path("/proc/self/clear_refs").write_text("5")
    began, seconds[0] = time.perf_counter(), 0.0
    state = rounds(shapes, clients, folder)
    sent = clients * sum(tensor.nbytes for tensor in state.values())
    figures = {
        "peak": peak() - libraries,
        "sent": sent,
        "left": sum(file.stat().st_size for file in (folder / "arrivals").glob("*")),
        "seconds": time.perf_counter() - began + seconds[0],
        "sha256": content_hash(state),
    }
    print(json.dumps(figures))


def served(method: str, clients: int, width: int) -> dict[str, Any]:
    """`serve` in a process of its own."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, __file__, "--serve", method, str(clients), str(width), folder]
        # So that what is measured is what is asked for, and not what the allocator keeps of it.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return dict(json.loads(done.stdout))


def by_clients(clients: Sequence[int], width: int) -> int:
    """Peak memory and seconds of FedAvg and Fed-CMP by number of clients."""
    print(f"projector of {width} x {width // 4} and {width} x {width}, two rounds, one thread a core")
    print(f"{'':14}{'clients':>8}{'sent MB':>9}{'peak MB':>9}{'seconds':>9}")
    missed = 0
    for method in ("fedavg", "exact"):
        figures = {number: served(method, number, width) for number in clients}
        for number, each in figures.items():
            sent, most = each["sent"] / 1e6, each["peak"] / 1e6
            print(f"{method:14}{number:8}{sent:9.0f}{most:9.0f}{each['seconds']:9.1f}", flush=True)
        growth = figures[clients[-1]]["peak"] / figures[clients[0]]["peak"]
        missed += growth > 1.2
        verdict = "passed" if growth <= 1.2 else "MISSED"
        what = f"{method}: memory with {clients[-1]} clients / with {clients[0]}"
        print(f"{verdict}: {what}: {growth:.2f} (at most 1.2)", flush=True)
    return 1 if missed else 0


def energy(basis: torch.Tensor, name: str, state: State, updates: list[Update], best: torch.Tensor) -> float:
    """Share of the energy in the 128 best directions that 128 columns of a basis hold."""
    shares, basis = data_weights(updates), basis[:, :128].to(torch.float32)
    deltas = {u.client: u.state[name] - state[name] for u in updates}
    whole = sum(shares[client] * float(delta.double().square().sum()) for client, delta in deltas.items())
    held = sum(shares[c] * float((basis.T @ delta).double().square().sum()) for c, delta in deltas.items())
    return held / whole / float(best[:128].sum())


def main(small: bool) -> int:
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in METHODS:
            out = Path(folder) / method
            out.mkdir()
            arguments = [sys.executable, __file__, "--method", method, str(out)]
            subprocess.run([*arguments, "--small"] if small else arguments, check=True)
            results[method] = {file.stem: torch.load(file) for file in out.iterdir()}
    state, updates = make_round(small)
    plain = results["naive"]
    print(f"\n{torch.get_num_threads()} threads, {CLIENTS} clients, memory as a multiple of their updates")
    print(f"{'':16}{'seconds':>9}{'faster':>9}{'memory':>8}{'no libs':>9}{'step off by':>13}{'energy':>9}")
    for method, result in results.items():
        figures = result["figures"]
        faster = plain["figures"]["seconds"] / figures["seconds"]
        matrices = [name for name, old in state.items() if old.ndim == 2]
        off = max(
            float((result["new"][n] - plain["new"][n]).norm() / (plain["new"][n] - state[n]).norm())
            for n in matrices
        )
        held = [
            energy(result["vectors"][f"vectors/{n}"], n, state, updates, plain["new"][f"values/{n}"])
            for n in matrices
            if f"vectors/{n}" in result["vectors"]
        ]
        figures |= {"faster": faster, "off": off}
        share = f"{min(held):9.4f}" if held else f"{'-':>9}"
        print(f"{method:16}{figures['seconds']:9.2f}{faster:8.1f}x{figures['memory']:8.2f}", end="")
        print(f"{figures['own']:9.2f}{off:13.1e}{share}")
    same_rank = max(
        float((results["randomised"]["new"][n] - new).norm() / (new - state[n]).norm())
        for n, new in results["exact, rank 128"]["new"].items()
        if state[n].ndim == 2
    )
    print(f"randomised is off by {same_rank:.1e} from exact of the same rank")
    exact, randomised = results["exact"]["figures"], results["randomised"]["figures"]
    gates = {
        "exact is 6 times faster than naive": exact["faster"] >= 6,
        "randomised is 40 times faster": randomised["faster"] >= 40,
        "exact agrees with naive to 1e-4": exact["off"] <= 1e-4,
        "memory without libraries is at most 3 times the updates": max(exact["own"], randomised["own"]) <= 3,
    }
    if small:
        return 0
    for gate, passed in gates.items():
        print(f"{'passed' if passed else 'MISSED'}: {gate}")
    return 0 if all(gates.values()) else 1


if __name__ == "__main__":
    if "--method" in sys.argv:
        at = sys.argv.index("--method")
        measure(sys.argv[at + 1], "--small" in sys.argv, Path(sys.argv[at + 2]))
    elif "--serve" in sys.argv:
        name, number, wide, place = sys.argv[sys.argv.index("--serve") + 1 :]
        serve(name, int(number), int(wide), Path(place))
    elif "--clients" in sys.argv:
        numbers = [int(each) for each in sys.argv[sys.argv.index("--clients") + 1].split(",")]
        wide_ = int(sys.argv[sys.argv.index("--width") + 1]) if "--width" in sys.argv else 4096
        sys.exit(by_clients(numbers, wide_))
    else:
        sys.exit(main("--small" in sys.argv))
