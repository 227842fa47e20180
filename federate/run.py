"""One run: caches and configuration in, `projector.safetensors`, history and manifest out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from fedcmp.federate.client.texts import Counts
from fedcmp.federate.compatible import refuse, refuse_over_ranks
from fedcmp.federate.engines.base import Engine, SiloCard
from fedcmp.federate.schedule import Schedule, schedule_of
from fedcmp.pipeline import history
from fedcmp.pipeline.config import Experiment
from fedcmp.pipeline.console import say, table
from fedcmp.pipeline.errors import UserError
from fedcmp.pipeline.files import locked
from fedcmp.pipeline.hashes import fingerprint
from fedcmp.pipeline.identity import run_identity
from fedcmp.pipeline.models.device import pick_device
from fedcmp.pipeline.ranks import Ranks
from fedcmp.pipeline.run_folder import PROJECTOR, RESIDUALS, Run, local_part, own_projector

if TYPE_CHECKING:
    from fedcmp.federate.server.progress import Progress
    from fedcmp.federate.strategies.base import Strategy
    from fedcmp.pipeline.models.projectors.base import Projector


def run(experiment: Experiment, engine: Callable[[Experiment, Schedule], Engine] | None = None) -> Run:
    """Train a run, continue it, or find it done.

    Args:
        experiment: The experiment.
        engine: Makes what reaches the clients; they are all in this process by default.

    Returns:
        The finished run.

    Raises:
        UserError: A cache is missing or of another encoder, or an option is wrong.
    """
    if experiment.align is not None:
        from fedcmp.federate.preference.run import align

        return align(experiment, engine)
    from fedcmp.federate.engines.local import LocalEngine
    from fedcmp.federate.finish import found
    from fedcmp.federate.strategies.base import STRATEGIES

    strategy = STRATEGIES.build(experiment.federate.strategy, "federate.strategy")
    schedule = schedule_of(experiment, strategy)
    refuse(experiment, strategy, schedule)
    server = _server(experiment)
    for warning in strategy.warnings():
        say(warning)
    clients = (engine or LocalEngine)(experiment, schedule)
    out = experiment.run_path
    with locked(out / ".lock", str(out)):
        cards = clients.cards()
        wanted = run_identity(experiment, next(iter(cards.values())).language) | {
            "caches": {name: cards[name].content for name in experiment.federate.silos},
        }
        made = found(experiment, wanted)
        if made is not None:
            return made
        made = _train(experiment, strategy, schedule, clients, cards, wanted, server)
    if experiment.federate.rounds:
        _summary(experiment.run, made)
    say(f"Projector and history in {out}")
    return made


def _server(experiment: Experiment) -> str:
    """Device of the server's arithmetic."""
    if experiment.federate.aggregation == "cpu":
        return "cpu"
    device = pick_device("auto")
    if device == "cpu":
        raise UserError("federate.aggregation = 'cuda': torch sees no CUDA device here; use 'cpu'")
    return device


def run_over(load: Callable[[], Experiment], ranks: Ranks | None) -> None:
    """The same over the processes that torchrun started: rank 0 does it, and the others train with it.

    Args:
        load: Reads the experiment.
        ranks: The processes; None where this is the only one.

    Raises:
        UserError: As `run`, or something that cannot be done over several.
    """
    from fedcmp.federate.engines.local import LocalEngine

    if ranks is None:
        run(load())
        return
    if ranks.leads:
        experiment = load()
        refuse_over_ranks(experiment, ranks.count)
        run(experiment, lambda own, schedule: LocalEngine(own, schedule, ranks))
        return
    from fedcmp.federate.ranks.follow import follow

    follow(load, None, ranks)


def _train(
    experiment: Experiment,
    strategy: Strategy,
    schedule: Schedule,
    engine: Engine,
    cards: Mapping[str, SiloCard],
    wanted: dict[str, Any],
    server: str,
) -> Run:
    from fedcmp.federate.arithmetic.place import computing_on
    from fedcmp.federate.finish import finish
    from fedcmp.federate.privacy.accounting import resolved
    from fedcmp.federate.server.arrivals import ARRIVALS, Arrivals
    from fedcmp.federate.server.fusion import Secure
    from fedcmp.federate.server.progress import Progress
    from fedcmp.federate.server.rounds import run_rounds
    from fedcmp.federate.server.tracker import Tracked, tracked
    from fedcmp.pipeline.models import projector as projectors

    options, out = experiment.federate, experiment.run_path
    checkpoint_path, print_of_run = out / "checkpoint.pt", fingerprint(wanted)
    saved = Progress.load(checkpoint_path, print_of_run)
    if saved is not None:
        say(f"{out}: continuing after round {saved.round} of {options.rounds}")
    first = cards[options.silos[0]]
    with engine.training(saved.round if saved else 0) as train:
        projector = projectors.build(options.projector, d_vision=first.d_vision, d_llm=engine.d_llm)
        counts = engine.counts()
        if saved is None:
            saved = _beginning(experiment, strategy, schedule, counts, projector, engine.adapter, wanted)
        rows = history.read(out / history.HISTORY)
        before = [row for row in rows if row["round"] < saved.round]
        seen = Tracked(experiment.experiment, experiment.run, print_of_run, wanted, out)
        with (
            tracked(experiment.tracker, seen, before) as track,
            Arrivals(out / ARRIVALS).opened() as arrivals,
            computing_on(server),
        ):
            done = run_rounds(
                saved,
                strategy,
                schedule.rounds,
                train,
                carry=options.optimizer.carry,
                history_path=out / history.HISTORY,
                track=track,
                checkpoint=lambda state: state.save(checkpoint_path, print_of_run),
                arrivals=arrivals,
                secure=Secure(engine.exchange, options.privacy.threshold)
                if options.privacy and options.secure
                else None,
                privacy=options.clipped
                and resolved(options.clipped, max(schedule.turns().values(), default=0), options.passes),
                passes=options.passes,
                traffic=engine.traffic,
                quorum=experiment.sites.quorum,
            )
    names = {PROJECTOR: done.state}
    names |= {own_projector(client): done.state | state for client, state in done.personal.items()}
    made = finish(
        experiment,
        options.strategy.name if options.rounds else "none",
        wanted,
        names,
        projector.architecture,
        first,
        {silo: counts[silo]._asdict() for silo in options.silos},
        {"local": _kept(out, done.counted)} if strategy.local else {},
    )
    checkpoint_path.unlink(missing_ok=True)
    rmtree(out / RESIDUALS, ignore_errors=True)
    return made


def _kept(run: Path, counted: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """The round of what each client kept to itself at last, and its content where it is on this machine."""
    from safetensors.torch import load_file

    from fedcmp.pipeline.models.projector import content_hash

    kept: dict[str, dict[str, Any]] = {}
    for client, round_ in counted.items():
        path = local_part(run, client, round_)
        kept[client] = {"round": round_, "content": content_hash(load_file(path)) if path.is_file() else None}
    return kept


def _beginning(
    experiment: Experiment,
    strategy: Strategy,
    schedule: Schedule,
    counts: Mapping[str, Counts],
    projector: Projector,
    adapter: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, Any],
) -> Progress:
    """What a run starts from: initial weights, and the strategy's memory."""
    import torch

    from fedcmp.federate.server.progress import Progress
    from fedcmp.pipeline.models import projector as projectors
    from fedcmp.pipeline.models.lora import draw
    from fedcmp.pipeline.models.pretrained import start_from

    generator, initial = torch.Generator().manual_seed(experiment.seed), experiment.federate.initial
    if initial is None:
        projectors.initialise(projector, generator)
        projector.begin()
    else:
        content = start_from(initial, projector, experiment.federate.projector.plugins)
        if content != wanted["federate"]["initial"]:
            raise UserError(f"federate.initial = {initial}: changed just now; run this again")
    whole = projectors.state_of(projector) | draw(adapter, generator)
    state = {name: each for name, each in whole.items() if not name.startswith(strategy.local)}
    samples = {name: sum(counts[silo].samples for silo in silos) for name, silos in schedule.groups.items()}
    return Progress(state, memory=strategy.begin(state, samples))


def _summary(name: str, run: Run) -> None:
    rows = run.history
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
                *("-" if row["loss"] is None else f"{row['loss']:.3f}" for row in (own[0], own[-1])),
                "-" if trust is None else f"{trust:.2f}",
            ]
        )
    seconds = sum(row["seconds"] or 0 for row in rows if row["client"])
    table(
        f"Run {name}: {last + 1} rounds" + (f" in {seconds:.1f} s" if seconds else ""),
        ["client", "samples", "first loss", "last loss", "reliability"],
        body,
    )
