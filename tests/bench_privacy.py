"""What privacy of texts costs on the embedded default: python tests/bench_privacy.py

Six silos of 1,152 pictures, one caption each, one pass. Learning rate, clip, and batch size with rounds are
chosen for FedAvg at ε = 4 by the validation loss on seeds 100 and 101, one after the other, and kept for all
else; held-out loss and POPE are of seeds 0 to 2. Every seed has data of its own. δ = 1e-5. Interrupted, it
goes on; runs that are done are not done again. About a quarter of an hour on one core, besides writing and
encoding the pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean, stdev

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fedcmp.components import load
from fedcmp.evaluate.run import evaluate_run
from fedcmp.extract.run import run as extract
from fedcmp.federate.run import run
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.files import read_json
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.world.write import Amounts, write

BUILD = Path("build")
TUNING, SEEDS = (100, 101), (0, 1, 2)
EPSILONS = (1.0, 2.0, 4.0, 8.0, None)
STRATEGIES = ("fedavg", "fedcmp")
Choice = dict[str, float]

# Where the search begins, and what is tried in turn with the others held. A batch is a whole round.
START: Choice = {"rounds": 12, "batch_size": 96, "clip": 0.1, "learning_rate": 1e-2}
GRID: list[tuple[str, list[Choice]]] = [
    ("learning_rate", [{"learning_rate": rate} for rate in (1e-2, 2e-2, 4e-2, 8e-2, 0.16, 0.32)]),
    ("clip", [{"clip": clip} for clip in (0.03, 0.1, 0.3)]),
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
        extract(experiment, only=(), overwrite=False)
    if not (experiment.run_path / "manifest.json").is_file():
        run(experiment)
    files = {name: experiment.scores_path / f"{name}.json" for name in benchmarks}
    missing = tuple(name for name, file in files.items() if not file.is_file())
    if missing:
        evaluate_run(experiment, missing)
    return {name: read_json(file)["metrics"] for name, file in files.items()}


def tuned() -> Choice:
    """FedAvg's choice at ε = 4."""
    best = dict(START)
    for name, options in GRID:
        losses = []
        for option in options:
            runs = [experiment_of("fedavg", seed, 4.0, best | option) for seed in TUNING]
            losses.append(fmean(scored(each, "validation")["validation"]["loss"]["value"] for each in runs))
        chosen = losses.index(min(losses))
        edge = ", at the edge of what was tried" if chosen in (0, len(options) - 1) else ""
        values = ", ".join(
            f"{option[name]:g}: {loss:.3f}" for option, loss in zip(options, losses, strict=True)
        )
        print(f"{name} {options[chosen][name]:g}{edge} ({values})", flush=True)
        best |= options[chosen]
    return best


def main() -> None:
    """Tune, then test."""
    torch.set_num_threads(1)
    choice = tuned()
    rows: dict[tuple[str, float | None], list[tuple[float, float]]] = {
        (strategy, epsilon): [] for epsilon in EPSILONS for strategy in STRATEGIES
    }
    for seed in SEEDS:
        for (strategy, epsilon), found in rows.items():
            scores = scored(experiment_of(strategy, seed, epsilon, choice), "loss", "pope")
            found.append((scores["loss"]["loss"]["value"], scores["pope"]["accuracy"]["value"]))
    print("| strategy | ε | held-out loss | POPE accuracy |", "|---|---|---|---|", sep="\n")
    for (strategy, epsilon), found in rows.items():
        losses, pope = zip(*found, strict=True)
        print(
            f"| {strategy} | {'∞' if epsilon is None else f'{epsilon:g}'} | {fmean(losses):.3f} ± "
            f"{stdev(losses):.3f} | {fmean(pope):.3f} ± {stdev(pope):.3f} |"
        )


if __name__ == "__main__":
    main()
