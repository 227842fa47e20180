"""The round loop: broadcast, train every client, aggregate, checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedcmp.federate.arithmetic.updates import State, distance
from fedcmp.federate.messages import Job, LocalResult
from fedcmp.federate.privacy.accounting import passes_of, spent
from fedcmp.federate.server.arrivals import Arrivals
from fedcmp.federate.server.fusion import Secure, aggregated, usable
from fedcmp.federate.server.progress import Progress
from fedcmp.federate.strategies.base import Aggregate, Strategy
from fedcmp.pipeline import history
from fedcmp.pipeline.console import say
from fedcmp.pipeline.privacy import Privacy

Train = Callable[[Sequence[Job]], Iterable[LocalResult]]


def run_rounds(
    progress: Progress,
    strategy: Strategy,
    rounds: Sequence[Sequence[str]],
    train: Train,
    *,
    carry: bool,
    history_path: Path,
    track: Callable[[Sequence[dict[str, Any]]], None] = lambda rows: None,
    checkpoint: Callable[[Progress], None],
    arrivals: Arrivals,
    secure: Secure | None = None,
    privacy: Privacy | None = None,
    traffic: Callable[[], tuple[int, int]] = lambda: (0, 0),
    quorum: int | None = None,
    passes: int = 1,
) -> Progress:
    """Run what is left of the rounds.

    Args:
        progress: Where to go on.
        strategy: What clients minimise and how their projectors are aggregated.
        rounds: Who takes part in each round.
        train: Does the clients' local training, here or elsewhere, and gives every result as it is there;
            where clients did not answer, those of the others, at least one.
        carry: Whether clients keep their optimisers' moments.
        history_path: JSON lines to append to.
        track: Called with every round's rows of the history.
        checkpoint: Called after every round.
        arrivals: Holds a round's updates until they are fused.
        secure: How to sum what clients keep to themselves; None where they send their updates.
        privacy: How clients clip and noise their updates, if they do.
        traffic: Bytes sent and received since it was asked last.
        quorum: Clients whose updates a round needs; all of them by default. With enough of them the
            round goes on without updates that are refused, as if those clients had not answered.
        passes: Passes over every client's samples.

    Returns:
        The progress after the last round.

    Raises:
        DivergedError: A client's update, or the aggregate, is not finite.
    """
    history.truncate(history_path, progress.round)
    for round_ in range(progress.round, len(rounds)):
        jobs = [
            Job(
                client=client,
                start=progress.state | progress.personal.get(client, {}),
                turn=sum(client in earlier for earlier in rounds[:round_]),
                round=round_,
                rounds=len(rounds),
                objective=strategy.objective(client, progress.memory),
                update=strategy.update,
                wants=strategy.wants,
                measure=strategy.aligned_by(),
                optimizer=progress.optimizers.get(client),
                counted=progress.counted.get(client),
            )
            for client in rounds[round_]
        ]
        if secure is None:
            results = usable(jobs, train(jobs), quorum, arrivals)
        else:
            answered = {result.client: result for result in train(jobs)}
            results = [answered[job.client] for job in jobs if job.client in answered]
        # A sum in which all count alike is as sensitive as one client's clipped update.
        alike = privacy is not None and privacy.unit == "client"
        samples = {result.client: 1 if alike else result.samples for result in results}
        aggregate = aggregated(strategy, progress, results, samples, secure)
        # Who drops out within a secure sum is not in it, and neither is its noise.
        present = samples.keys() if secure is None else aggregate.figures["weight"].keys()
        rows, noise = _rows(jobs, results, present, progress.state, aggregate), dict(progress.noise)
        if privacy is not None:
            share = len(present) / len(jobs) if privacy.unit == "client" else 1.0
            turns, done = _turns(rounds), _turns(rounds[: round_ + 1])
            for result in results:
                if result.client in present:
                    # As many answers of a round are together one of less noise.
                    multiplier = privacy.noise_multiplier * (share / result.releases) ** 0.5
                    of = passes_of(done[result.client] - 1, turns[result.client], passes)
                    often = 1 if privacy.unit == "client" else len(of)
                    noise[result.client] = [*noise.get(result.client, []), *[multiplier] * often]
            begun = {client: passes_of(done[client] - 1, turns[client], passes).stop for client in noise}
            _tell(rows, noise, privacy, begun)
        sent, received = traffic()
        rows[-1] |= {"bytes": sent + received, "bytes_received": received}
        history.append(history_path, rows)
        track(rows)
        personal, optimizers = dict(progress.personal), dict(progress.optimizers)
        if strategy.personal:
            personal |= {r.client: {name: new.clone() for name, new in r.state.items()} for r in results}
        personal |= aggregate.personal
        if carry:
            optimizers |= {r.client: r.optimizer for r in results if r.optimizer is not None}
        counted = progress.counted | dict.fromkeys(samples, round_)
        progress = Progress(
            aggregate.state, round_ + 1, aggregate.memory, personal, optimizers, noise, counted
        )
        checkpoint(progress)
        arrivals.clear()
    return progress


def _turns(rounds: Sequence[Sequence[str]]) -> Counter[str]:
    """How often each client takes part."""
    return Counter(client for each in rounds for client in each)


def _tell(
    rows: Sequence[dict[str, Any]],
    noise: Mapping[str, Sequence[float]],
    privacy: Privacy,
    begun: Mapping[str, int],
) -> None:
    """Write every client's ε into its row, and the greatest into the round's; None without noise.

    A client is in all of its rounds; a text or an image in one of each pass that has begun, the worst ones
    at worst.
    """
    epsilons = {
        client: spent(each if privacy.unit == "client" else sorted(each)[: begun[client]], privacy.delta)
        for client, each in noise.items()
    }
    for row in rows[:-1]:
        row["epsilon"] = epsilons.get(row["client"]) if privacy.noise_multiplier else None
    rows[-1]["epsilon"] = max(epsilons.values()) if privacy.noise_multiplier else None
    if privacy.noise_multiplier:
        say(
            f"round {rows[-1]['round'] + 1}: epsilon = {rows[-1]['epsilon']:.2f} at delta = "
            f"{privacy.delta:g} for every {privacy.unit}"
        )


def _rows(
    jobs: Sequence[Job],
    results: Sequence[LocalResult],
    present: Collection[str],
    before: State,
    aggregate: Aggregate,
) -> list[dict[str, Any]]:
    """The round in the history: a row a client that answered, and one of the server."""
    of = {job.client: job for job in jobs}
    rows: list[dict[str, Any]] = [
        {
            "round": jobs[0].round,
            "client": result.client,
            "loss": result.loss,
            "samples": result.samples,
            "tokens": result.tokens,
            "flops": result.flops,
            "seconds": _rounded(result.seconds),
            "recalled": result.recalled,
            **({"update_norm": distance(result.state, of[result.client].start)} if result.state else {}),
            **{name: figure.get(result.client) for name, figure in aggregate.figures.items()},
        }
        for result in results
    ]
    whole = {
        "round": jobs[0].round,
        "client": None,
        "missing": sorted(of.keys() - set(present)),
        **_totals(results),
        "update_norm": distance(aggregate.state, before),
    }
    return [*rows, whole]


def _totals(results: Sequence[LocalResult]) -> dict[str, Any]:
    """Sums over clients, and their mean loss a token; None of what a client keeps to itself."""
    losses = [r.loss * r.tokens for r in results if r.loss is not None and r.tokens is not None]
    tokens = [r.tokens for r in results if r.tokens is not None]
    seconds = [r.seconds for r in results if r.seconds is not None]
    flops = [r.flops for r in results if r.flops is not None]
    everybody = len(losses) == len(tokens) == len(seconds) == len(results)
    return {
        "loss": sum(losses) / sum(tokens) if everybody else None,
        "samples": sum(result.samples for result in results),
        "tokens": sum(tokens) if everybody else None,
        "flops": sum(flops) if len(flops) == len(results) else None,
        "seconds": _rounded(sum(seconds)) if everybody else None,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
