"""One run: caches and configuration in, `projector.safetensors`, history and manifest out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federate import history
from pipeline.cache import FeatureCache, differences, open_cache, same_key
from pipeline.config import Experiment, Federate
from pipeline.console import progress, say, table
from pipeline.device import pick_device
from pipeline.errors import UserError
from pipeline.identity import FORMAT, language_options, run_identity
from pipeline.manifest import fingerprint, locked, provenance, read_json, write_json

if TYPE_CHECKING:
    from federate.memo import Memo
    from federate.strategies.base import Strategy


def run(experiment: Experiment) -> Path:
    """Train a run, continue it, or find it done.

    Returns:
        The run's directory.

    Raises:
        UserError: A cache is missing or of another encoder, or an option is wrong.
    """
    from federate.strategies.base import STRATEGIES

    caches = {name: open_cache(experiment, name) for name in experiment.federate.silos}
    same_key(caches)
    strategy = STRATEGIES.build(experiment.federate.strategy, "federate.strategy")
    out = experiment.run_path
    wanted = run_identity(experiment) | {
        "strategy": strategy.model_dump(mode="json"),
        "caches": {name: cache.content for name, cache in caches.items()},
    }
    with locked(out / ".lock", str(out)):
        manifest = read_json(out / "manifest.json")
        if manifest is not None:
            changed = differences(wanted, manifest.get("identity", {}))
            if not changed:
                say(f"{out}: nothing to do, this run is what the configuration asks for")
                return out
            say(f"{out}: training again, because {'; '.join(changed)}")
            (out / "manifest.json").unlink()
        _train(experiment, strategy, caches, wanted)
    if experiment.federate.rounds:
        _summary(experiment.run, out)
    say(f"Projector and history in {out}")
    return out


def _train(
    experiment: Experiment, strategy: Strategy, caches: dict[str, FeatureCache], wanted: dict[str, Any]
) -> None:
    import torch

    from federate.batches import Stream
    from federate.local import LocalEngine
    from federate.participation import participants
    from federate.server import Progress, run_rounds
    from pipeline import projector as projectors
    from pipeline.language import load_language
    from pipeline.pretrained import start_from

    options, out = experiment.federate, experiment.run_path
    first = next(iter(caches.values()))
    device = pick_device(experiment.device)
    language = load_language(
        experiment.language.path,
        **language_options(experiment),
        checkpointing=options.checkpointing,
        compiled=options.compile,
    )
    projector = projectors.build(options.projector, d_vision=first.d_vision, d_llm=language.d_llm)
    visual_tokens = projector.tokens(first.patches)
    if options.initial is None:
        projectors.initialise(projector, torch.Generator().manual_seed(experiment.seed))
    else:
        start_from(options.initial, projector)
    projector.to(device)
    groups = {"all": options.silos} if strategy.pooled else {name: (name,) for name in options.silos}
    schedule = participants(list(groups), options.rounds, options.clients_per_round, experiment.seed)
    turns = Counter(client for round_ in schedule for client in round_)
    _refuse_absent(groups, turns, strategy, options)
    streams = {
        client: Stream(
            {silo: caches[silo] for silo in silos},
            language,
            template=experiment.language.template,
            max_length=experiment.language.max_length,
            batch_size=options.batch_size,
            turns=turns[client],
            seed=experiment.seed,
            visual_tokens=visual_tokens,
        )
        for client, silos in groups.items()
    }
    checkpoint_path, print_of_run = out / "checkpoint.pt", fingerprint(wanted)
    saved = Progress.load(checkpoint_path, print_of_run)
    if saved is not None:
        say(f"{out}: continuing after round {saved.round} of {options.rounds}")
    elif checkpoint_path.exists():
        say(f"{out}: the checkpoint there is of another configuration; starting anew")
    if saved is None:
        state = projectors.state_of(projector)
        samples = {client: stream.size for client, stream in streams.items()}
        saved = Progress(state, memory=strategy.begin(state, samples))
    done_turns = Counter(client for round_ in schedule[: saved.round] for client in round_)
    steps = sum(
        stream.steps(turn)
        for client, stream in streams.items()
        for turn in range(done_turns[client], turns[client])
    )
    with progress(experiment.run, steps, "steps") as task:
        engine = LocalEngine(
            streams,
            projector,
            language,
            options.optimizer,
            batch_size=options.batch_size,
            together=options.together,
            micro_batch=options.micro_batch or options.batch_size,
            memo=_memo(experiment, wanted, device),
            advance=task.advance,
        )
        done = run_rounds(
            saved,
            strategy,
            schedule,
            engine,
            carry=options.optimizer.carry,
            history_path=out / "history.jsonl",
            checkpoint=lambda state: state.save(checkpoint_path, print_of_run),
        )
    names = {"projector.safetensors": done.state}
    names |= {f"silos/{client}.safetensors": state for client, state in done.personal.items()}
    for name, state in names.items():
        projectors.save_projector(out / name, state, projector.architecture)
    write_json(
        out / "manifest.json",
        {
            "experiment": experiment.experiment,
            "run": experiment.run,
            "strategy": options.strategy.name if options.rounds else "none",
            "identity": wanted,
            "fingerprint": print_of_run,
            "cache_key": first.cache_key,
            "features": {"patches": first.patches, "key": first.manifest["key"]},
            "projectors": {name: projectors.content_hash(state) for name, state in names.items()},
            "made_by": provenance(device),
        },
    )
    checkpoint_path.unlink(missing_ok=True)


def _refuse_absent(
    clients: Iterable[str], turns: Mapping[str, int], strategy: Strategy, options: Federate
) -> None:
    """Every client must take part, and in every round where it trains alone."""
    where = f"federate.clients_per_round = {options.clients_per_round}"
    never = [client for client in clients if options.rounds and not turns[client]]
    if never:
        raise UserError(
            f"{where}: {', '.join(never)} would never take part in {options.rounds} rounds; raise it, or "
            "federate.rounds"
        )
    if strategy.personal and options.clients_per_round:
        raise UserError(f"{where}: silos that train alone take part in every round; remove it")


def _memo(experiment: Experiment, wanted: dict[str, Any], device: str) -> Memo | None:
    """Local updates shared by runs with the same LLM, data handling and arithmetic."""
    import torch

    from federate.memo import Memo

    if experiment.memo is None:
        return None
    options = wanted["federate"]
    shared = ("batch_size", "micro_batch", "projector", "optimizer")
    context = {
        "options": {name: options[name] for name in shared},
        "language": wanted["language"],
        "compile": experiment.federate.compile,
        "device": device,
        "threads": torch.get_num_threads(),
        "format": FORMAT,
        "made_by": provenance(device)["packages"],
    }
    return Memo(experiment.memo.path, experiment.memo.limit, context)


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
