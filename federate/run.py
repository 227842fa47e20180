"""One run: caches and configuration in, `projector.safetensors`, history and manifest out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from federate import history
from pipeline.cache import FeatureCache, differences, open_cache, same_key
from pipeline.config import Experiment
from pipeline.console import progress, say, table
from pipeline.device import pick_device
from pipeline.identity import run_identity
from pipeline.manifest import fingerprint, locked, provenance, read_json, write_json


def run(experiment: Experiment) -> Path:
    """Train a run, continue it, or find it done.

    Returns:
        The run's directory.

    Raises:
        UserError: A cache is missing or of another encoder, or an option is wrong.
    """
    caches = {name: open_cache(experiment, name) for name in experiment.federate.silos}
    same_key(caches)
    out = experiment.run_path
    wanted = run_identity(experiment) | {"caches": {name: cache.content for name, cache in caches.items()}}
    manifest = read_json(out / "manifest.json")
    if manifest is not None:
        changed = differences(wanted, manifest.get("identity", {}))
        if not changed:
            say(f"{out}: nothing to do, this run is what the configuration asks for")
            return out
        say(f"{out}: training again, because {'; '.join(changed)}")
        (out / "manifest.json").unlink()
    with locked(out / ".lock", str(out)):
        _train(experiment, caches, wanted)
    if experiment.federate.rounds:
        _summary(experiment.run, out)
    say(f"Projector and history in {out}")
    return out


def _train(experiment: Experiment, caches: dict[str, FeatureCache], wanted: dict[str, Any]) -> None:
    import torch

    from federate.batches import Stream
    from federate.server import Progress, run_rounds
    from federate.strategies.base import STRATEGIES
    from pipeline import projector as projectors
    from pipeline.language import FrozenLanguageModel

    options, out = experiment.federate, experiment.run_path
    strategy = STRATEGIES.build(options.strategy, "federate.strategy")
    first = next(iter(caches.values()))
    device, dtype = pick_device(experiment.device), wanted["language"]["dtype"]
    language = FrozenLanguageModel(experiment.language.path, dtype=dtype, device=device)
    projector = projectors.build(options.projector, d_vision=first.d_vision, d_llm=language.d_llm)
    projectors.initialise(projector, torch.Generator().manual_seed(experiment.seed))
    projector.to(device)
    groups = {"all": options.silos} if strategy.pooled else {name: (name,) for name in options.silos}
    streams = {
        client: Stream(
            {silo: caches[silo] for silo in silos},
            language,
            template=experiment.language.template,
            max_length=experiment.language.max_length,
            batch_size=options.batch_size,
            rounds=options.rounds,
            seed=experiment.seed,
        )
        for client, silos in groups.items()
    }
    checkpoint_path, print_of_run = out / "checkpoint.pt", fingerprint(wanted)
    saved = Progress.load(checkpoint_path, print_of_run)
    if saved is not None:
        say(f"{out}: continuing after round {saved.round} of {options.rounds}")
    elif checkpoint_path.exists():
        say(f"{out}: the checkpoint there is of another configuration; starting anew")
    left = range(saved.round if saved else 0, options.rounds)
    steps = sum(stream.steps(round_) for stream in streams.values() for round_ in left)
    with progress(experiment.run, steps, "steps") as task:
        done = run_rounds(
            saved or Progress(projectors.state_of(projector)),
            projector,
            language,
            streams,
            strategy,
            options.optimizer,
            rounds=options.rounds,
            history_path=out / "history.jsonl",
            checkpoint=lambda state: state.save(checkpoint_path, print_of_run),
            advance=task.advance,
        )
    names = {"projector.safetensors": done.state}
    names |= {f"silos/{client}.safetensors": state for client, state in done.personal.items()}
    for name, state in names.items():
        projectors.save_projector(out / name, state, options.projector.name)
    write_json(
        out / "manifest.json",
        {
            "experiment": experiment.experiment,
            "run": experiment.run,
            "strategy": options.strategy.name if options.rounds else "none",
            "identity": wanted,
            "fingerprint": print_of_run,
            "cache_key": first.cache_key,
            "projectors": {name: projectors.content_hash(state) for name, state in names.items()},
            "made_by": provenance(device),
        },
    )
    checkpoint_path.unlink(missing_ok=True)


def _summary(name: str, out: Path) -> None:
    rows = history.read(out / "history.jsonl")
    clients = list(dict.fromkeys(row["client"] for row in rows if row["client"]))
    last = max(row["round"] for row in rows)
    body = []
    for client in clients:
        own = [row for row in rows if row["client"] == client]
        trust = next((row.get("reliability") for row in own if row["round"] == last), None)
        body.append(
            [
                client,
                f"{sum(row['samples'] for row in own):,}",
                f"{own[0]['loss']:.3f}",
                f"{own[-1]['loss']:.3f}",
                "-" if trust is None else f"{trust:.2f}",
            ]
        )
    seconds = sum(row["seconds"] for row in rows if row["client"])
    table(
        f"Run {name}: {last + 1} rounds in {seconds:.1f} s",
        ["client", "samples", "first loss", "last loss", "reliability"],
        body,
    )
