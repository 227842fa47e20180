"""The history in a tracker that people already look at; the history itself stays what counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fedcmp.pipeline.console import complain
from fedcmp.pipeline.errors import UserError, one_line

Row = Mapping[str, Any]
Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class Tracked:
    """A run as trackers see it.

    Attributes:
        project: Name of the experiment.
        name: Name of the run.
        fingerprint: Of the run's identity; an interrupted run is found again by it.
        config: What decides the run.
        out: The run's directory.
    """

    project: str
    name: str
    fingerprint: str
    config: Mapping[str, Any]
    out: Path


@contextmanager
def _tensorboard(run: Tracked) -> Iterator[Log]:
    """Event files in the run's directory."""
    from torch.utils.tensorboard import SummaryWriter

    # Rounds that are done are sent again.
    for old in run.out.glob("tensorboard/events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(run.out / "tensorboard")) as writer:

        def log(round_: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, round_)

        yield log


@contextmanager
def _wandb(run: Tracked) -> Iterator[Log]:
    """Weights & Biases, which takes no step twice."""
    import wandb

    with wandb.init(
        project=run.project,
        name=run.name,
        id=run.fingerprint[:32],
        config=dict(run.config),
        resume="allow",
        dir=str(run.out),
    ) as opened:
        begun = opened.step
        yield lambda round_, figures: opened.log(dict(figures), step=round_) if round_ >= begun else None


@contextmanager
def _mlflow(run: Tracked) -> Iterator[Log]:
    """MLflow, at `$MLFLOW_TRACKING_URI` or in the run's directory; it would keep a step twice."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.out.absolute()}/mlflow.db"))
    known = client.get_experiment_by_name(run.project)
    place = known.experiment_id if known else client.create_experiment(run.project)
    found = client.search_runs([place], f"tags.fingerprint = '{run.fingerprint}'")
    if found:
        opened = found[0].info.run_id
        client.update_run(opened, "RUNNING")
    else:
        opened = client.create_run(
            place, run_name=run.name, tags={"fingerprint": run.fingerprint}
        ).info.run_id
        client.log_dict(opened, dict(run.config), "identity.json")
    names = client.get_run(opened).data.metrics
    last = {name: max(each.step for each in client.get_metric_history(opened, name)) for name in names}

    def log(round_: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            if round_ > last.get(name, -1):
                client.log_metric(opened, name, value, step=round_)

    yield log
    client.set_terminated(opened)


@contextmanager
def _trackio(run: Tracked) -> Iterator[Log]:
    """Trackio, on this machine or in the Space that `$TRACKIO_SPACE_ID` names."""
    import trackio

    name = f"{run.name}-{run.fingerprint[:8]}"
    opened = trackio.init(project=run.project, name=name, config=dict(run.config), resume="allow")
    yield lambda round_, figures: opened.log(dict(figures), step=round_)
    opened.finish()


TRACKERS = {"mlflow": _mlflow, "tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb}


def figures(rows: Iterable[Row]) -> dict[str, float]:
    """One round's numbers by name: the server's (`loss`), and each client's (`berlin/loss`)."""
    return {
        f"{row['client']}/{name}" if row["client"] else name: float(value)
        for row in rows
        for name, value in row.items()
        if name != "round" and isinstance(value, int | float)
    }


@contextmanager
def tracked(
    tracker: str | None, run: Tracked, before: Sequence[Row]
) -> Iterator[Callable[[Sequence[Row]], None]]:
    """A function that sends a round's rows of the history to a tracker, if one is named.

    A tracker that fails later is told of and left alone: no run ends for it.

    Args:
        tracker: Which one.
        run: What is tracked.
        before: Rows of rounds that were done before.

    Raises:
        UserError: The tracker's package is not installed, or it does not take the run.
    """
    with ExitStack() as stack:
        if tracker is None:
            yield lambda rows: None
            return
        try:
            log = stack.enter_context(TRACKERS[tracker](run))
        except ImportError as error:
            raise UserError(f"tracker = '{tracker}': {error}; pip install 'fedcmp[{tracker}]'") from None
        except Exception as error:
            raise UserError(f"tracker = '{tracker}': cannot begin a run: {one_line(error)}") from None

        failed = False

        def send(rows: Sequence[Row]) -> None:
            nonlocal failed
            try:
                for round_, of_round in () if failed else groupby(rows, key=lambda row: row["round"]):
                    log(round_, figures(of_round))
            except Exception as error:
                failed = True
                complain(f"tracker '{tracker}': {one_line(error)}; the run goes on without it")

        send(before)
        yield send
