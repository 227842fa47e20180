"""What privacy of texts costs on the embedded default: python tests/bench_privacy.py [--only tune]

Six silos of 1,152 pictures, one caption each, one pass. Rounds, batch size, clip and learning rate are chosen
at ε = 4 by the validation loss on seeds 100 and 101, one after the other, and then kept; held-out loss and
POPE are of seeds 0 to 2. Every seed has data of its own. δ = 1e-5. Interrupted, it goes on; runs that are
done are not done again. About half an hour on one core, besides writing and encoding the pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import extract.run
from evaluate.run import evaluate_run
from federate.run import run
from pipeline.config import Experiment, load
from pipeline.manifest import fingerprint, read_json, write_json
from pipeline.world.write import Amounts, write

BUILD = Path("build")
TUNING, SEEDS = (100, 101), (0, 1, 2)
EPSILONS = (1.0, 2.0, 4.0, 8.0, None)
STRATEGIES = ("fedavg", "fedcmp")
Choice = dict[str, float]

# Where the search begins, and what is tried in turn with the others held. A batch is a whole round.
START: Choice = {"rounds": 12, "batch_size": 96, "clip": 1.0, "learning_rate": 1e-2}
GRID: list[tuple[str, list[Choice]]] = [
    ("clip", [{"clip": 0.1}, {"clip": 0.3}, {"clip": 1.0}, {"clip": 3.0}]),
    ("learning_rate", [{"learning_rate": 5e-3}, {"learning_rate": 1e-2}, {"learning_rate": 2e-2}]),
    (
        "batch_size",
        [
            {"rounds": 12, "batch_size": 48},
            {"rounds": 12, "batch_size": 96},
            {"rounds": 6, "batch_size": 192},
        ],
    ),
]


def experiment_of(strategy: str, seed: int, epsilon: float | None, choice: Choice) -> Experiment:
    """One run; without ε it clips and has no noise."""
    federate = {"rounds": choice["rounds"], "batch_size": choice["batch_size"], "together": 1}
    federate |= {"optimizer.learning_rate": choice["learning_rate"], "privacy.clip": choice["clip"]}
    noise = [] if epsilon is None else [f"federate.privacy.epsilon={epsilon}"]
    return load(
        Path("configs/scenarios/demo.toml"),
        [
            f"seed={seed}",
            f"run=private-{fingerprint([strategy, epsilon, choice])[:10]}",
            f"ledger.path={BUILD / 'ledger'}",
            f"federate.strategy.name={strategy}",
            'federate.privacy.unit="text"',
            *noise,
            *(f"federate.{key}={value}" for key, value in federate.items()),
        ],
    )


def scored(experiment: Experiment, *benchmarks: str) -> dict[str, dict[str, dict[str, float]]]:
    """Train and score a run, or find it done."""
    world = BUILD / "world" / experiment.experiment
    if not (world / "manifest.json").is_file():
        write(world, Amounts(seed=experiment.seed, validation_images=300))
    if not all(
        experiment.cache_path(silo).joinpath("manifest.json").is_file() for silo in experiment.extract.silos
    ):
        extract.run.run(experiment, only=(), overwrite=False)
    if not (experiment.run_path / "manifest.json").is_file():
        run(experiment)
    files = {name: experiment.scores_path / f"{name}.json" for name in benchmarks}
    missing = tuple(name for name, file in files.items() if not file.is_file())
    if missing:
        evaluate_run(experiment, missing)
    return {name: read_json(file)["metrics"] for name, file in files.items()}


def tuned(strategy: str) -> tuple[Choice, list[str]]:
    """The choice at ε = 4, and what was tried."""
    best, tried = dict(START), []
    for name, options in GRID:
        losses = {}
        for number, option in enumerate(options):
            choice = best | option
            losses[number] = fmean(
                scored(experiment_of(strategy, seed, 4.0, choice), "validation")["validation"]["loss"][
                    "value"
                ]
                for seed in TUNING
            )
            print(f"{strategy} {choice}: {losses[number]:.3f}", flush=True)
        chosen = min(losses, key=losses.__getitem__)
        edge = ", at the edge of what was tried" if chosen in (0, len(options) - 1) else ""
        values = ", ".join(f"{option[name]:g}: {losses[n]:.3f}" for n, option in enumerate(options))
        best |= options[chosen]
        tried.append(f"{strategy}, {name} {options[chosen][name]:g}{edge} ({values})")
    return best, tried


def rows(strategy: str, choice: Choice) -> Iterator[str]:
    """The table's rows of a strategy."""
    for epsilon in EPSILONS:
        found = [scored(experiment_of(strategy, seed, epsilon, choice), "loss", "pope") for seed in SEEDS]
        losses = [each["loss"]["loss"]["value"] for each in found]
        pope = [each["pope"]["accuracy"]["value"] for each in found]
        yield (
            f"| {strategy} | {'∞' if epsilon is None else f'{epsilon:g}'} | {fmean(losses):.3f} ± "
            f"{stdev(losses):.3f} | {fmean(pope):.3f} ± {stdev(pope):.3f} |"
        )


def main(only: str) -> None:
    """Tune, then test."""
    torch.set_num_threads(1)
    chosen = {}
    for strategy in STRATEGIES:
        chosen[strategy], tried = tuned(strategy)
        print(*tried, sep="\n", flush=True)
    write_json(BUILD / "privacy.json", chosen)
    if only == "tune":
        return
    print("| strategy | ε | held-out loss | POPE accuracy |\n|---|---|---|---|", flush=True)
    for strategy in STRATEGIES:
        for row in rows(strategy, chosen[strategy]):
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[2] if len(sys.argv) > 2 else "all")
